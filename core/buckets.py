"""Batches of samples of like size, bounded by how many they are and by the size that they take together.

Samples are sorted by size and divided into buckets; a bucket's batches are as large as its largest sample
allows. Each epoch shuffles within the buckets and shuffles the batches, by (seed, epoch) alone; how many
batches there are stays the same, and so a run can be resumed at any of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Indices, Schedule


class Buckets:
    """The batches of each epoch, and the position among them.

    Args:
        sizes: How large each sample is.
        limit: Of a batch at most: its largest sample's size times how many it has; None for no limit.
        buckets: How many there are; more mean batches of more like sizes, and less chance in who meets whom.
        shuffle: For training; else the order stays, the largest first: what does not fit into memory says so
            at once.
        seed: Of the order.
        share: This process and the number of processes; each has its own batches, as many as the others: the
            largest batches are halved until their number can be divided.
        most: Samples of a batch at most; None for no limit.

    Shape:
        sizes `[samples]`.

    Raises:
        DataError: There is no sample.
        UsageError: One alone is above the limit.
    """

    def __init__(
        self,
        sizes: NDArray[np.floating | np.integer],
        limit: float | None,
        buckets: int = 20,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        most: int | None = None,
    ) -> None:
        if not len(sizes):
            raise DataError("there is nothing to make batches of")
        if limit is not None and (largest := float(sizes.max())) > limit:
            raise UsageError(f"a sample takes {largest:g}, and a batch at most {limit:g}")
        self.shuffle, self.seed = shuffle, seed
        order = np.argsort(-sizes, kind="stable")
        self._groups = [group for group in np.array_split(order, buckets) if len(group)]
        most = len(sizes) if most is None else most
        counts = [
            most if limit is None else min(most, int(limit / max(sizes[group[0]], 1e-9)))
            for group in self._groups
        ]
        self._cuts = [  # where batches begin and end, in all groups put together
            begin + cut
            for begin, group, count in zip(self._starts(), self._groups, counts, strict=True)
            for cut in range(0, len(group), count)
        ] + [len(order)]
        self._even(share[1])
        self.schedule = Schedule(len(self._cuts) - 1, 1, shuffle, False, seed, share)

    def __len__(self) -> int:
        return len(self.schedule)

    def _even(self, processes: int) -> None:
        """Halve the batches of the most samples until each process has as many; one sample is not halved."""
        for _ in range(-(len(self._cuts) - 1) % processes):
            counts = np.diff(self._cuts)
            most = int(counts.argmax())
            if counts[most] > 1:
                self._cuts.insert(most + 1, self._cuts[most] + int(counts[most] + 1) // 2)

    def _starts(self) -> list[int]:
        sizes = np.cumsum([len(group) for group in self._groups])
        return [0, *sizes[:-1].tolist()]

    def order(self, epoch: int) -> Indices:
        """Return all samples of an epoch, bucket after bucket."""
        if not self.shuffle:
            return np.concatenate(self._groups)
        rng = np.random.default_rng([self.seed, epoch, 1])
        return np.concatenate([rng.permutation(group) for group in self._groups])

    def plan(self, first: int = 0) -> Iterator[Indices]:
        """Yield the samples of this epoch's batches, from one of them on; the position stays."""
        order = self.order(self.schedule.epoch)
        for batches in self.schedule.plan(first):
            yield np.concatenate([order[self._cuts[i] : self._cuts[i + 1]] for i in batches])
