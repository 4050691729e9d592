"""Serving of retrofitted models by vLLM, as a plugin of it. Importing this package imports neither vLLM nor torch."""
