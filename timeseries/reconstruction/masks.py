"""Gaps made on purpose, so that what fills them can be judged, and the two plainest ways to fill any."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.timeseries.windows import Batch, Windows, fill_gaps, running_max


class MaskedBatch(Batch):
    """A batch of windows some of whose observed cells are to be rebuilt."""

    hidden: Tensor  # [B, L, N] bool; a part of `observed`


def draw_gaps(noise: Tensor, ratio: float, gap: int) -> Tensor:
    """Hide a share of the cells, in runs.

    A run begins at a cell with one probability, and lasts `gap` steps; runs may touch. The probability is
    such that each cell is hidden with probability `ratio`, at the window's edges too.

    Args:
        noise: Uniform between 0 and 1.
        ratio: Expected share of hidden cells.
        gap: Steps of a run.

    Shape:
        noise `[B, L + gap - 1, N]` -> `[B, L, N]` bool.
    """
    begins = noise < 1 - (1 - ratio) ** (1 / gap)
    return begins.unfold(1, gap, 1).any(dim=-1)


def turns(steps: int, columns: int, passes: int, gap: int) -> Tensor:
    """Return in which of several passes each cell is hidden: in runs of steps, the columns in turn.

    Shape:
        `[steps, columns]`, from 0 to passes - 1.
    """
    return (torch.arange(steps)[:, None] // gap + torch.arange(columns)) % passes


class Masked:
    """Windows with hidden cells: drawn anew whenever a window is asked for, or the same each time.

    Args:
        windows: The windows; their batches say what is observed.
        ratio: Expected share of hidden cells, between 0 and 1.
        gap: Steps of a run of hidden cells.
        seed: Fixes each window's gaps, whatever its batch; None draws them by torch's generator.
    """

    def __init__(self, windows: Windows, ratio: float, gap: int, seed: int | None) -> None:
        self.windows, self.ratio, self.gap, self.seed = windows, ratio, gap, seed

    def __len__(self) -> int:
        return len(self.windows)

    def gather(self, indices: NDArray[np.integer]) -> MaskedBatch:
        """Return the windows of some indices."""
        batch = self.windows.gather(indices)
        steps, n = self.windows.seq_len + self.gap - 1, batch["x"].shape[-1]
        if self.seed is None:
            noise = torch.rand(len(indices), steps, n)
        else:
            each = [
                np.random.default_rng([self.seed, i]).random((steps, n), np.float32) for i in indices.tolist()
            ]
            noise = torch.from_numpy(np.stack(each))
        return {**batch, "hidden": draw_gaps(noise, self.ratio, self.gap) & batch["observed"]}


def last_value(x: Tensor, observed: Tensor) -> Tensor:
    """Fill gaps with the value before, at a window's beginning with the first one; with 0 if there is none.

    Shape:
        x, observed `[B, L, N]` -> `[B, L, N]`.
    """
    return fill_gaps(torch.where(observed, x, float("nan")))


def linear(x: Tensor, observed: Tensor) -> Tensor:
    """Fill gaps on the line between the values around them, at a window's ends with the nearest value.

    Shape:
        x, observed `[B, L, N]` -> `[B, L, N]`.
    """
    before, after = last_value(x, observed), last_value(x.flip(1), observed.flip(1)).flip(1)
    steps = torch.arange(x.shape[1], device=x.device)[:, None]
    since = steps - running_max(torch.where(observed, steps, -1))
    until = -running_max(-torch.where(observed, steps, len(steps)).flip(1)).flip(1) - steps
    share = since.to(x.dtype) / (since + until).clamp(min=1)  # where observed both are 0
    return before + (after - before) * share
