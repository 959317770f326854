"""Dropout whose mask is cheap on a CPU.

PyTorch draws one random number an element, one after the other on one core: a third of the training step of a
small transformer. Here one 64-bit draw serves four elements; sixteen bits decide on each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16  # sixteen bits an element


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    On a CPU, p is rounded to a multiple of 2**-16 (and the scale with it, so the mean stays exact).
    Elsewhere, and under `torch.compile`, this is `torch.nn.functional.dropout`. Draws come from the default
    generator.

    Args:
        p: Probability that an element is dropped, in [0, 1].
        training: Whether to drop at all.

    Raises:
        ValueError: p is outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability must be in [0, 1], not {p}")
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training=True)
    return x * dropout_mask(x.shape, p, x.dtype)


def dropout_mask(shape: torch.Size, p: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a mask of zeros and 1 / (1 - p) on the CPU; p is rounded to a multiple of 2**-16."""
    dropped = round(p * _LEVELS)
    if dropped == _LEVELS:
        return torch.zeros(shape, dtype=dtype)
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)  # the full range
    bits = draws.view(torch.int16)[:count].view(shape)  # uniform over [-2**15, 2**15)
    keep = bits >= dropped - _LEVELS // 2
    return keep.to(dtype).mul_(_LEVELS / (_LEVELS - dropped))
