"""The inside of a chunk by loops compiled on first use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.core.ops.decay_attention import numba_kernels
from manyheads.core.ops.decay_attention.fading import Faded, Inputs, Pulls


class NumbaFading:
    """`fading.Fading` by compiled loops."""

    def remaining(self, total: Tensor, group: int, at: slice, backwards: bool) -> Tensor:
        """See `fading.Fading`."""
        size, shared = total.shape[1], total.shape[3]
        found = torch.empty(at.stop - at.start, shared, size, size)
        numba_kernels.remaining(total.numpy(), found.numpy(), group, at.start, backwards)
        return found

    def fade(self, given: Inputs, found: Faded, head: int, at: slice, scale: float) -> None:
        """See `fading.Fading`."""
        arrays: Any = [x.numpy() for x in (*given, *found)]
        numba_kernels.fade(*(*arrays, head, at.start, at.stop, np.float32(scale)))

    def pull(self, given: Inputs, pulls: Pulls, found: Inputs, head: int, at: slice, scale: float) -> None:
        """See `fading.Fading`."""
        arrays: Any = [x.numpy() for x in (*given, *pulls, *found)]
        numba_kernels.pull(*(*arrays, head, at.start, at.stop, np.float32(scale)))
