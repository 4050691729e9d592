"""Benchmarks of dms_kernels on one NVIDIA GPU: `PYTHONPATH=kernels python -m bench --help`. Needs torch, triton and numpy alone."""
