"""Wan on one GPU, in minutes: `python benchmarks/gpu`, see `__main__.py`."""
