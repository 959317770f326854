"""Loops compiled for this machine's CPU on first use, by numba: what the ops' `numba_kernels.py` share.

Only those files import this module, and they are imported when the backend `numba` is taken: numba costs
0.2 s to import. Compiled loops are kept on disk (beside the source, or in the user's cache, or, where neither
can be written, not at all). numba looks at the date of the kernel's own file only: after an edit of this
module, remove the `__pycache__` beside the kernels.

A kernel releases Python's lock: split large work into parts and give them to `core.parallel.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np

Kernel = TypeVar("Kernel", bound=Callable[..., object])

# Sums may be reordered and products fused, so that loops become vectors; NaN and infinities stay.
_OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}


def kernel(function: Kernel) -> Kernel:
    """Compile a loop over numpy arrays; its types are those of its first call."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder that could hold the cache
        return numba.njit(**_OPTIONS)(function)


def inline(function: Kernel) -> Kernel:
    """Compile a small function into the kernels that call it."""
    return numba.njit(inline="always", **_OPTIONS)(function)


@inline
def exp(x: np.float32) -> np.float32:
    """The exponential of a float32, in a form that a loop over it can vectorise; relative error below 1.2e-7.

    Above 88.37, where 2^n ends, infinity; below -87.33 zero (there are no subnormal results), NaN stays NaN.

    Source:
        Cephes, expf: x = n ln 2 + r, and a polynomial of degree 7 in r.
    """
    low, high = np.float32(-87.33), np.float32(88.37)
    z = high if x > high else x
    z = low if z < low else z
    n = np.floor(z * np.float32(1.44269504) + np.float32(0.5))
    r = (z - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    # Horner's form to the end: a sum of three terms could be reordered, at up to a unit more of rounding.
    p = p * r + np.float32(1.0)
    y = p * r + np.float32(1.0)
    y = y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = np.float32(np.inf) if x > high else y
    return np.float32(0.0) if x < low else y
