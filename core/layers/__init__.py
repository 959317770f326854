"""Modules with parameters over `manyheads.core.ops`, one idea a file."""
