"""Benchmarks of the kernels, each behind a check of what it measures. Run `python -m benchmarks` in `kernels/`."""
