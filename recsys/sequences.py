"""Histories of users as one flat array, and windows of them, cut when a batch is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.recsys.logs import Log, Numbers
from manyheads.recsys.values import Values
from manyheads.recsys.vocabulary import Vocabulary

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """What users chose, in order of time.

    Args:
        items: Numbers of the items, user after user.
        offsets: Where each user's begin, and the end of all.
        times: When; None where nobody knows.
        user_ids: The users, in order.
        item_ids: The items of the numbers.

    Shape:
        items, times `[events]`; offsets `[users + 1]`.
    """

    items: Numbers
    offsets: Places
    times: Values | None
    user_ids: Vocabulary
    item_ids: Vocabulary

    @classmethod
    def of(cls, log: Log) -> Sequences:
        """Take the rows of a log, which stand in order."""
        counts = np.bincount(log.users, minlength=len(log.user_ids))
        return cls(log.items, starts_of(counts), log.times, log.user_ids, log.item_ids)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Places:
        """Events of each user."""
        return np.diff(self.offsets)

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return len(self.item_ids)

    def history(self, user: int) -> Numbers:
        """Return a user's items."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def owners(self) -> Numbers:
        """Return the number of the user of each event."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.lengths)

    def numbered_by(self, item_ids: Vocabulary) -> Sequences:
        """Return the same histories with the items' numbers of a vocabulary, behind which new ones come."""
        grown = item_ids.copy()
        numbers = grown.add(self.item_ids.ids).astype(np.int32)
        return replace(self, items=numbers[self.items], item_ids=grown)


class Cells(NamedTuple):
    """Ragged rows as pairs: `items[i]` is in row `rows[i]`.

    Shape:
        rows, items `[cells]`, rows in order.
    """

    rows: Places
    items: Numbers


def starts_of(counts: NDArray[np.integer]) -> Places:
    """Return where ragged rows of these lengths begin, and the end of all."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


def cells(items: Numbers, first: Places, end: Places) -> Cells:
    """Return the items from `first` to before `end`, of one row each.

    Shape:
        first, end `[rows]`.
    """
    lengths = end - first
    starts = starts_of(lengths)
    rows = np.repeat(np.arange(len(first)), lengths)
    return Cells(rows, items[np.arange(starts[-1]) + (first - starts[:-1])[rows]])


def k_core(sequences: Sequences, users: int, items: int) -> tuple[Sequences, int]:
    """Leave out users with fewer than so many events, and items, until all that are left have as many.

    Users and items are numbered anew, in the order that they had; items without an event have no number then.

    Returns:
        The rest, and the rounds that left something out.

    Raises:
        DataError: Nothing is left.
    """
    whose, what = sequences.owners(), sequences.items
    left = np.arange(len(what))
    rounds = 0
    while True:
        by_user = np.bincount(whose[left], minlength=len(sequences))
        by_item = np.bincount(what[left], minlength=sequences.num_items)
        good = (by_user[whose[left]] >= users) & (by_item[what[left]] >= items)
        if good.all():
            break
        left, rounds = left[good], rounds + 1
    if not len(left):
        raise DataError(f"no user has {users} events with items of {items} events (lower the k-core)")
    return _renumbered(sequences, left, by_user > 0, by_item > 0), rounds


def without_items(sequences: Sequences, bad: NDArray[np.bool_]) -> Sequences:
    """Leave out some items, and users that have no other.

    Shape:
        bad `[items]`.

    Raises:
        DataError: Nothing is left.
    """
    left = np.flatnonzero(~bad[sequences.items])
    if not len(left):
        raise DataError("no event is left, of any item")
    by_user = np.bincount(sequences.owners()[left], minlength=len(sequences))
    return _renumbered(sequences, left, by_user > 0, ~bad)


def _renumbered(
    sequences: Sequences, left: Places, users: NDArray[np.bool_], items: NDArray[np.bool_]
) -> Sequences:
    """Return the events that are left, with dense numbers."""
    number = (np.cumsum(items) - 1).astype(np.int32)
    counts = np.bincount(sequences.owners()[left], minlength=len(sequences))
    return Sequences(
        number[sequences.items[left]],
        starts_of(counts[users]),
        None if sequences.times is None else sequences.times[left],
        sequences.user_ids.select(np.flatnonzero(users)),
        sequences.item_ids.select(np.flatnonzero(items)),
    )


class Windows(NamedTuple):
    """Stretches of histories, in order of user and time.

    Args:
        users: Whose.
        first: Where each begins, in the flat array.
        end: Where it ends.
    """

    users: Numbers
    first: Places
    end: Places


def windows(first: Places, end: Places, length: int, step: int | None = None) -> Windows:
    """Cut stretches of the flat array into windows of at most `length`.

    One that is longer is cut from its end backwards, each window `step` before the next; the earliest begins
    at the stretch's begin, whatever that leaves of the step. Empty stretches give none.

    Args:
        first: Where each stretch begins.
        end: Where it ends.
        length: Of a window, at most.
        step: None keeps the last window alone.

    Source:
        BERT4Rec's `gen_data_fin.py`.
    """
    lengths = end - first
    over = np.maximum(lengths - length, 0)
    counts = np.where(lengths > 0, 1, 0)
    if step is not None:
        counts = counts + -(-over // step)
    users = np.repeat(np.arange(len(first), dtype=np.int32), counts)
    back = (counts[users] - 1) - (np.arange(len(users)) - starts_of(counts)[users])  # 0 is the last
    begins = first[users] + np.maximum(over[users] - back * (step or 0), 0)
    return Windows(users, begins, np.minimum(begins + length, end[users]))


def padded(
    items: Numbers,
    first: Places,
    end: Places,
    length: int,
    pad: int,
    side: Literal["left", "right"] = "left",
    shift: int = 0,
) -> NDArray[np.int64]:
    """Return windows as rows of the same length.

    Args:
        items: The flat array.
        first: Where windows begin.
        end: Where they end; of a longer one the last `length` items count.
        length: Of a row.
        pad: Fills a row; on its left, or on its right.
        side: Where.
        shift: Added to the numbers of items, not to `pad`.

    Shape:
        first, end `[B]`; the result `[B, length]`.
    """
    first = np.maximum(first, end - length)
    begin = end - length if side == "left" else first
    place = begin[:, None] + np.arange(length)
    inside = (place >= first[:, None]) & (place < end[:, None])
    found = items[np.where(inside, place, 0)].astype(np.int64) + shift
    return np.where(inside, found, pad)


def packed(items: Numbers, first: Places, end: Places, shift: int = 0) -> tuple[Numbers, Places]:
    """Return windows one behind the other, and where each begins: what packed attention takes.

    Shape:
        the items `[total]`, the starts `[B + 1]`.
    """
    return cells(items, first, end).items + np.int32(shift), starts_of(end - first)
