"""Benchmarks of inference, which `dms bench` runs."""
