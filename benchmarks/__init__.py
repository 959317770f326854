"""Benchmarks against the named peers: `python -m benchmarks core`. Not in the wheel."""
