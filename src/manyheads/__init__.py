"""Manyheads: sequence models for five domains on one attention/SSM core.

Importing this package imports no torch; the three names below load what they need when called.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load"]

if TYPE_CHECKING:
    from manyheads.core.catalog import create_model, list_models
    from manyheads.core.hub import load


# After each of its operations torch's OpenMP threads spin for some 15 ms, on cores that the core's own workers
# (core/parallel.py) then lack: up to twice the time of an op. A fraction of a millisecond serves torch as well.
# It is read when torch is first imported; whoever sets it decides.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def __getattr__(name: str) -> object:
    """Resolve the public functions on first use (PEP 562)."""
    if name in ("create_model", "list_models"):
        from manyheads.core import catalog

        return getattr(catalog, name)
    if name == "load":
        from manyheads.core.hub import load

        return load
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
