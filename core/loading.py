"""Which samples come in which batch: an order by (seed, epoch) alone, and a position to go on from.

What makes batches of samples (windows of series, images) is the domain's; a loader of its own asks a
`Schedule` here. Lightning sets the epoch (it looks for `sampler.set_epoch`) and stores a loader's
`state_dict` in its checkpoints, so that a fit resumes at the right batch of the right order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Indices = NDArray[np.integer]


def share_of(trainer: Trainer | None) -> tuple[int, int]:
    """Return this process' number and how many there are; a data module without a trainer is alone."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


class Schedule:
    """The batches of each epoch as sample numbers, and how many of them were given.

    Args:
        samples: How many samples there are.
        batch_size: Samples a batch.
        shuffle: Draw a new order each epoch.
        drop_last: Leave out a last batch that is not full.
        seed: Seed of the order.
        part: This process and the number of processes; each has its own samples, as many as the others.
        weights: Draw as many samples as there are with these chances, with replacement, instead of an order.

    Shape:
        weights `[samples]`, positive.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        weights: NDArray[np.floating] | None = None,
    ) -> None:
        self.samples, self.batch_size, self.shuffle, self.drop_last = samples, batch_size, shuffle, drop_last
        self.seed, self.part, self.weights = seed, part, weights
        self.epoch, self._given, self._resumed = 0, 0, False

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; a saved position of another epoch is dropped."""
        if epoch != self.epoch:
            self.epoch, self._given, self._resumed = epoch, 0, False

    def __len__(self) -> int:
        full, rest = divmod(self.samples // self.part[1], self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> Indices:
        """Return the order of the samples in an epoch, of all processes together."""
        n = self.samples
        kind = np.int32 if n < 1 << 31 else np.int64
        if self.weights is not None:
            draws = np.random.default_rng([self.seed, epoch]).random(n) * self.weights.sum()
            return np.searchsorted(np.cumsum(self.weights), draws, side="right").clip(0, n - 1).astype(kind)
        order: Indices = np.arange(n, dtype=kind)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order

    def plan(self, first: int = 0) -> Iterator[Indices]:
        """Yield the sample numbers of this epoch's batches, from one of them on; the position stays."""
        (rank, world), n, size = self.part, self.samples, self.batch_size
        drawn = self.shuffle or self.weights is not None
        mine = self.order(self.epoch)[rank : n - n % world : world] if drawn else None
        for i in range(first, len(self)):
            if mine is None:
                yield np.arange(i * size, min((i + 1) * size, n // world)) * world + rank
            else:
                yield mine[i * size : (i + 1) * size]

    def begin(self) -> int:
        """Begin an epoch: return its first batch, which is not 0 where a saved position goes on."""
        first = self._given if self._resumed else 0
        self._given, self._resumed = first, False
        return first

    def give(self) -> None:
        """Count a batch, before it is handed over."""
        self._given += 1

    def end(self) -> None:
        """End an epoch."""
        self.epoch, self._given = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the batches already given in it."""
        return {"epoch": self.epoch, "batch": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position."""
        done = state["batch"] >= len(self)
        self.epoch, self._given = (state["epoch"] + 1, 0) if done else (state["epoch"], state["batch"])
        self._resumed = True
