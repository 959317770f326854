"""Benchmarks against the named peers: `python -m benchmarks core`. Not in the wheel."""

import manyheads  # noqa: F401  # before torch, as a user of the command line has it
