"""Which frames of a batch are a recording's own, and how a CPU goes over them: stretches side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core import parallel

STRIPE, LEAST = 1024, 256  # frames of a stretch, at most and at least: what they need stays in the cache


class Frames(NamedTuple):
    """Which frames of a batch are a recording's own.

    Attributes:
        lengths: How many each row has, `[B]`.
        valid: True where a frame is the row's own, `[B, S, 1]`.
    """

    lengths: Tensor
    valid: Tensor


def frames_of(lengths: Tensor, size: int) -> Frames:
    """The first `lengths` of `size` frames."""
    return Frames(lengths, (torch.arange(size, device=lengths.device) < lengths[:, None])[..., None])


class Stripe(NamedTuple):
    """The frames `first` to `last`, and with their neighbours on both sides `low` to `high`."""

    first: int
    last: int
    low: int
    high: int

    @property
    def own(self) -> slice:
        """The stripe's frames."""
        return slice(self.first, self.last)

    @property
    def wide(self) -> slice:
        """Its neighbours too."""
        return slice(self.low, self.high)

    @property
    def inner(self) -> slice:
        """Where in the wide part the stripe's frames are."""
        return slice(self.first - self.low, self.last - self.low)

    def of(self, frames: Frames | None) -> Frames | None:
        """Which frames of the wide part are a recording's own."""
        return None if frames is None else Frames(frames.lengths, frames.valid[:, self.wide])


def stripes(batch: int, size: int, reach: int, work: Callable[[Stripe], None]) -> None:
    """Do the work of all stretches of `size` frames, side by side; without gradients.

    Args:
        reach: Neighbouring frames that a stretch reads on each side.
        work: Writes its stretch of the result.
    """
    share = -(-size // parallel.workers())
    stride = max(1, min(STRIPE, max(share, LEAST)) // batch)
    starts = [(first, min(first + stride, size)) for first in range(0, size, stride)]
    cut = [Stripe(first, last, max(0, first - reach), min(size, last + reach)) for first, last in starts]
    parallel.run([partial(work, stripe) for stripe in cut])


def silence(x: Tensor, frames: Frames | None) -> Tensor:
    """Put zeros, whatever stood there, behind each row's end."""
    return x if frames is None else x.masked_fill(~frames.valid, 0.0)
