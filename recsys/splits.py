"""What is trained on, what is validated on, and what is tested on; and whether one leaks into another.

Every split here is two places in each history: training stops at the first, validation at the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.sequences import Cells, Places, Sequences, cells

Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Split:
    """A division of histories.

    Args:
        sequences: The histories.
        val: Where each user's validation begins in the flat array, and training ends.
        test: Where each user's test begins, and validation ends.
        kind: How it was made.

    Shape:
        val, test `[users]`.
    """

    sequences: Sequences
    val: Places
    test: Places
    kind: str

    def span(self, part: Part) -> tuple[Places, Places]:
        """Return where each user's events of a part begin and end."""
        offsets = self.sequences.offsets
        bounds = (offsets[:-1], self.val, self.test, offsets[1:])
        index = ("train", "val", "test").index(part)
        return bounds[index], bounds[index + 1]

    def counts(self) -> NDArray[np.int64]:
        """Return how often each item was chosen in training."""
        first, end = self.span("train")
        return np.bincount(cells(self.sequences.items, first, end).items, minlength=self.sequences.num_items)

    def questions(self, part: Part, target: Literal["next", "all"] = "next") -> Questions:
        """Return whom a part asks about: every user with a history and an event in it."""
        first, end = self.span(part)
        begin = self.sequences.offsets[:-1]
        users = np.flatnonzero((end > first) & (first > begin))
        if not len(users):
            raise DataError(f"the split {self.kind} leaves no user with an event to {part} on")
        last = first[users] + 1 if target == "next" else end[users]
        return Questions(users, begin[users], first[users], cells(self.sequences.items, first[users], last))

    def __str__(self) -> str:
        parts: tuple[Part, ...] = ("train", "val", "test")
        spans = {part: self.span(part) for part in parts}
        sizes = [
            f"{part} {int((end - first).sum()):,} of {int((end > first).sum()):,} users"
            for part, (first, end) in spans.items()
        ]
        return f"{self.kind}: {', '.join(sizes)}"


class Questions(NamedTuple):
    """What is asked: these users, by their history so far, about these targets.

    Args:
        users: Numbers of the users.
        first: Where their history begins in the flat array.
        end: Where it ends, before the targets.
        targets: What they chose then: its rows count `users`.
    """

    users: Places
    first: Places
    end: Places
    targets: Cells


def leave_one_out(sequences: Sequences) -> Split:
    """Test on the last event of each user, validate on the one before.

    Users with fewer than three are trained on alone.
    """
    begin, end = sequences.offsets[:-1], sequences.offsets[1:]
    few = end - begin < 3
    return Split(sequences, np.where(few, end, end - 2), np.where(few, end, end - 1), "leave one out")


def by_ratio(sequences: Sequences, val: float = 0.1, test: float = 0.1) -> Split:
    """Validate and test on the last shares of each history, rounded down; training has one event at least.

    Raises:
        UsageError: The shares leave nothing to train on.
    """
    _check_shares(val, test)
    begin, end = sequences.offsets[:-1], sequences.offsets[1:]
    lengths = end - begin
    last = np.minimum((lengths * test + 1e-9).astype(np.int64), np.maximum(lengths - 1, 0))
    middle = np.minimum((lengths * val + 1e-9).astype(np.int64), np.maximum(lengths - 1 - last, 0))
    return Split(sequences, end - last - middle, end - last, f"ratio {1 - val - test:g}/{val:g}/{test:g}")


def by_time(sequences: Sequences, val: float = 0.1, test: float = 0.1) -> Split:
    """Cut at two times, the same for all: no event of training is later than one of validation or test.

    The times are those that leave about these shares of the events behind them; events of the same time
    stay together, on the later side.

    Raises:
        UsageError: The shares leave nothing to train on.
        DataError: The log has no times, or all events have the same.
    """
    _check_shares(val, test)
    if sequences.times is None:
        raise DataError("the log has no times to cut at: take another split, or name its timestamp column")
    times = np.sort(sequences.times)
    places = [min(len(times) - 1, int(len(times) * share)) for share in (1 - val - test, 1 - test)]
    at_val, at_test = times[places[0]], times[places[1]]
    if at_val == times[0]:
        raise DataError("a cut in time leaves nothing to train on: too many events have the earliest time")
    return at_times(sequences, at_val, at_test)


def at_times(sequences: Sequences, val: float, test: float) -> Split:
    """Cut at two times: validation begins with the first, the test with the second.

    Raises:
        DataError: The log has no times.
        UsageError: The second is before the first.
    """
    if sequences.times is None:
        raise DataError("the log has no times to cut at: take another split, or name its timestamp column")
    if test < val:
        raise UsageError(f"the test would begin at {test}, before validation at {val}")
    offsets = sequences.offsets
    before = [np.concatenate(([0], np.cumsum(sequences.times < at))) for at in (val, test)]
    # Within a user times ascend: what is before a cut stands first.
    begins = [offsets[:-1] + each[offsets[1:]] - each[offsets[:-1]] for each in before]
    return Split(sequences, begins[0], begins[1], f"by time, at {val} and {test}")


def _check_shares(val: float, test: float) -> None:
    if not (val >= 0 and test > 0 and val + test < 1):
        raise UsageError(
            f"the shares of validation {val} and test {test} must be positive and below 1 together"
        )


class Leaks(NamedTuple):
    """How a split leaks.

    Args:
        order: Users whose training or validation is later than what follows it: a fault of any split.
        overlap: Events in two parts, or in none: a fault, too.
        future: Training events not before the earliest of validation and test, of whomever: by these a model
            learns what became popular later. Only a cut in time has none; None where there are no times.
        training: Training events.
    """

    order: int
    overlap: int
    future: int | None
    training: int


def leaks(split: Split) -> Leaks:
    """Look for what training could know of validation and test, and validation of test."""
    offsets, times = split.sequences.offsets, split.sequences.times
    begin, end = offsets[:-1], offsets[1:]
    overlap = int(((split.val < begin) | (split.test < split.val) | (end < split.test)).sum())  # of users
    parts = [_mask(split, part) for part in ("train", "val", "test")]
    training = int(parts[0].sum())
    overlap += int((np.sum(parts, axis=0) != 1).sum())
    if times is None or overlap:
        return Leaks(0, overlap, None, training)
    owners = split.sequences.owners()
    order = np.zeros(len(split.sequences), bool)
    for earlier, later in ((parts[0], parts[1] | parts[2]), (parts[1], parts[2])):
        latest = np.full(len(split.sequences), -np.inf)
        first = np.full(len(split.sequences), np.inf)
        np.maximum.at(latest, owners[earlier], times[earlier])
        np.minimum.at(first, owners[later], times[later])
        order |= latest > first
    held = times[parts[1] | parts[2]]
    future = int((times[parts[0]] >= held.min()).sum()) if len(held) else 0
    return Leaks(int(order.sum()), overlap, future, training)


def _mask(split: Split, part: Part) -> NDArray[np.bool_]:
    """Mark the events of a part."""
    first, end = split.span(part)
    steps = np.zeros(len(split.sequences.items) + 1, np.int32)
    np.add.at(steps, first, 1)
    np.add.at(steps, end, -1)
    return np.cumsum(steps[:-1]) > 0
