"""What launches of Triton kernels share: the row of a table for a GPU, the width of a tile, dense rows."""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.4426950408889634  # kernels have their exponentials in base 2


def architecture(x: Tensor) -> int:
    """The launch table's row for a tensor's device, 90 or 80: a GPU not in it takes the one below it.

    In the interpreter, where tensors are on the CPU, it is the newest.
    """
    newest = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9
    return 90 if newest else 80


def padded(dim: int) -> int:
    """The width of a tile for so many channels: a power of two, and at least 16, as products need."""
    return max(16, 1 << (dim - 1).bit_length())


def dense(x: Tensor) -> Tensor:
    """The tensor itself, or a copy if its last stride is not 1: kernels take any others."""
    return x if x.stride(-1) == 1 else x.contiguous()
