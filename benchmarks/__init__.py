"""Benchmarks: ``python -m benchmarks.NAME [--quick] [--seed N] [--json FILE]``."""
