"""Batches of utterances of like length, bounded by the seconds that they take with their padding.

Utterances are sorted by length and divided into buckets; a bucket's batches are as large as its longest
utterance allows. Each epoch shuffles within the buckets and shuffles the batches, by (seed, epoch) alone;
how many batches there are stays the same, and so a run can be resumed at any of them.
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
        seconds: How long each utterance is.
        limit: Seconds of a batch at most: its longest utterance times how many it has.
        buckets: How many there are; more mean less padding, and less chance in who meets whom.
        shuffle: For training; else the order stays, the longest first: what does not fit into memory says so
            at once.
        seed: Of the order.
        share: This process and the number of processes; each has its own batches, as many as the others.

    Shape:
        seconds `[utterances]`.

    Raises:
        DataError: There is no utterance.
        UsageError: One alone is above the limit.
    """

    def __init__(
        self,
        seconds: NDArray[np.floating],
        limit: float,
        buckets: int = 20,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if not len(seconds):
            raise DataError("there are no utterances to make batches of")
        longest = float(seconds.max())
        if longest > limit:
            raise UsageError(
                f"an utterance takes {longest:.1f} s, and a batch at most {limit:g} s: raise "
                "loading.batch_seconds, or leave long utterances out with loading.max_seconds"
            )
        self.shuffle, self.seed = shuffle, seed
        order = np.argsort(-seconds, kind="stable")
        self._groups = [group for group in np.array_split(order, buckets) if len(group)]
        sizes = [int(limit / seconds[group[0]]) for group in self._groups]
        self._cuts = [  # where batches begin and end, in all groups put together
            begin + cut
            for begin, group, size in zip(self._starts(), self._groups, sizes, strict=True)
            for cut in range(0, len(group), size)
        ] + [len(order)]
        self.schedule = Schedule(len(self._cuts) - 1, 1, shuffle, False, seed, share)

    def __len__(self) -> int:
        return len(self.schedule)

    def _starts(self) -> list[int]:
        sizes = np.cumsum([len(group) for group in self._groups])
        return [0, *sizes[:-1].tolist()]

    def order(self, epoch: int) -> Indices:
        """Return all utterances of an epoch, bucket after bucket."""
        if not self.shuffle:
            return np.concatenate(self._groups)
        rng = np.random.default_rng([self.seed, epoch, 1])
        return np.concatenate([rng.permutation(group) for group in self._groups])

    def plan(self, first: int = 0) -> Iterator[Indices]:
        """Yield the utterances of this epoch's batches, from one of them on; the position stays."""
        order = self.order(self.schedule.epoch)
        for (batch,) in self.schedule.plan(first):
            yield order[self._cuts[batch] : self._cuts[batch + 1]]
