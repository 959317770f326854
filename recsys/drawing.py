"""What a model of texts is trained on: events drawn anew each epoch, each with the history before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Job, Schedule
from manyheads.recsys.models.encoder import Packed
from manyheads.recsys.sequences import Places, Sequences
from manyheads.recsys.source import pack_windows


@dataclass(frozen=True)
class Drawing:
    """What is trained on: events drawn anew each epoch, each with the history before it.

    Args:
        length: Items of a history, the newest; of validation, test and prediction, too.
        per_user: Events that are drawn of each user, with replacement.
        buckets: Groups of texts of like length that batches are made of.
        cold: The share of items that training never sees, drawn by `seed`: what is recommended of them the
            test tells by itself.
    """

    length: int = 50
    per_user: int = 1
    buckets: int = 8
    cold: float = 0.0

    def __post_init__(self) -> None:
        if min(self.length, self.per_user, self.buckets) < 1 or not 0 <= self.cold < 1:
            raise UsageError(
                "drawing: length, per_user and buckets are at least 1, and cold is from 0 to below 1"
            )


class Drawn(NamedTuple):
    """A batch of training.

    Args:
        histories: Items as tokens.
        targets: The numbers of the items that came next.

    Shape:
        targets `[B]`.
    """

    histories: Packed
    targets: Tensor


class Draw:
    """Draws an epoch's events, and puts those of like length into batches.

    Args:
        sequences: That are trained on.
        lengths: Tokens of each item.
        of: What is drawn.
        batch_size: Events of a batch.
        max_tokens: Of a text.
        seed: Of the draws.
        share: This process and the number of processes.

    Raises:
        DataError: There is nothing to draw.
    """

    def __init__(
        self,
        sequences: Sequences,
        lengths: NDArray[np.int64],
        of: Drawing,
        batch_size: int,
        max_tokens: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.sequences, self.of, self.seed, self.share = sequences, of, seed, share
        self.size, self.most = batch_size, max_tokens
        self._tokens = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths[sequences.items])))
        self._users = np.flatnonzero(self.sequences.lengths >= 2)
        if not len(self._users):
            raise DataError("no user has two events to train on")
        self.schedule: Schedule = self._buckets(0, self.events(0)).schedule

    def events(self, epoch: int) -> Places:
        """Return the places of an epoch's targets; each has an event before it."""
        users = np.repeat(self._users, self.of.per_user)
        chance = np.random.default_rng([self.seed, epoch, 2]).random(len(users))
        others = self.sequences.lengths[users] - 1
        return self.sequences.offsets[users] + 1 + (chance * others).astype(np.int64)

    def __call__(self, first: int) -> Iterator[Job]:
        """Yield the jobs of the schedule's epoch from a batch on."""
        epoch = self.schedule.epoch
        events = self.events(epoch)
        buckets = self._buckets(epoch, events)
        return ((events[indices],) for indices in buckets.plan(first))

    def make(self, events: Places) -> Drawn:
        """Return the batch of these targets."""
        histories = pack_windows(self.sequences, self._first(events), events)
        return Drawn(histories, torch.from_numpy(self.sequences.items[events]).long())

    def _first(self, events: Places) -> Places:
        """Return where the targets' histories begin."""
        begins = self.sequences.offsets[np.searchsorted(self.sequences.offsets, events, "right") - 1]
        return np.maximum(begins, events - self.of.length)

    def _buckets(self, epoch: int, events: Places) -> Buckets:
        lengths: NDArray[np.int64] = self._tokens[events] - self._tokens[self._first(events)]
        found = Buckets(
            np.minimum(lengths, self.most), None, self.of.buckets, True, self.seed, self.share, self.size
        )
        found.schedule.epoch = epoch
        return found
