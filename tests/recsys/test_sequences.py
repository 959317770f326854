"""Histories and windows, against the plain loops that say what they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from manyheads.core.errors import DataError
from manyheads.recsys.logs import make_log, read_log
from manyheads.recsys.sequences import Sequences, cells, k_core, packed, padded, starts_of, windows


def sequences(*histories: str) -> Sequences:
    users = [str(user) for user, items in enumerate(histories) for _ in items]
    return Sequences.of(make_log(users, [item for items in histories for item in items]))


def texts(found: Sequences) -> list[str]:
    return ["".join(found.item_ids.ids[item] for item in found.history(u)) for u in range(len(found))]


def test_histories_are_those_of_the_log() -> None:
    frame = pd.DataFrame({"user_id": list("abab"), "item_id": list("xyzw"), "timestamp": [4, 3, 2, 1]})
    found = Sequences.of(read_log(frame))
    assert texts(found) == ["zx", "wy"]
    assert found.lengths.tolist() == [2, 2]
    assert found.owners().tolist() == [0, 0, 1, 1]
    assert found.times is not None and found.times.tolist() == [2, 4, 1, 3]


def test_the_core_is_cut_until_nothing_changes() -> None:
    # x is chosen once; without it the first user has too few, and then y goes, and with it the second user.
    found, rounds = k_core(sequences("xy", "yab", "abab", "baab"), 3, 2)
    assert texts(found) == ["abab", "baab"]
    assert (found.user_ids.ids, found.item_ids.ids, rounds) == (["2", "3"], ["a", "b"], 3)
    whole, none = k_core(sequences("ab", "ab"), 2, 2)
    assert (texts(whole), none) == (["ab", "ab"], 0)
    with pytest.raises(DataError, match="lower the k-core"):
        k_core(sequences("ab", "cd"), 2, 2)


def test_the_core_of_random_logs_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user": rng.integers(0, 60, 500), "item": rng.integers(0, 90, 500)})
    found, _ = k_core(Sequences.of(make_log(frame["user"].astype(str), frame["item"].astype(str))), 6, 4)
    while True:
        users, items = (frame[name].map(frame[name].value_counts()) for name in ("user", "item"))
        if ((users >= 6) & (items >= 4)).all():
            break
        frame = frame[(users >= 6) & (items >= 4)]
    wanted = {str(user): part.astype(str).tolist() for user, part in frame.groupby("user")["item"]}
    have = {
        found.user_ids.ids[u]: [found.item_ids.ids[i] for i in found.history(u)] for u in range(len(found))
    }
    assert have == wanted
    assert len(found.item_ids) == frame["item"].nunique() > 10


def cut(history: list[int], length: int, step: int) -> list[list[int]]:
    """BERT4Rec's own rule, as its generator has it."""
    begins = [*range(len(history) - length, 0, -step), 0]
    return [history[begin : begin + length] for begin in begins[::-1]]


@pytest.mark.parametrize(("length", "step"), [(4, 2), (4, 1), (5, 5), (7, 3), (1, 1), (50, 10)])
def test_windows_are_cut_by_the_papers_rule(length: int, step: int) -> None:
    lengths = np.array([0, 1, 3, 4, 5, 6, 8, 13, 29, 0])
    starts = starts_of(lengths)
    items = np.arange(starts[-1], dtype=np.int32)
    found = windows(starts[:-1], starts[1:], length, step)
    wanted = [
        (user, window)
        for user, size in enumerate(lengths)
        if size
        for window in cut(items[starts[user] : starts[user] + size].tolist(), length, step)
    ]
    have = [
        (int(u), items[a:b].tolist()) for u, a, b in zip(found.users, found.first, found.end, strict=True)
    ]
    assert have == wanted


def test_without_a_step_the_last_window_stays_alone() -> None:
    starts = starts_of(np.array([3, 0, 9]))
    found = windows(starts[:-1], starts[1:], 4)
    assert (found.users.tolist(), found.first.tolist(), found.end.tolist()) == ([0, 2], [0, 8], [3, 12])


def test_rows_are_padded_on_either_side_or_packed() -> None:
    items = np.arange(10, dtype=np.int32)
    first, end = np.array([0, 3, 4, 9]), np.array([3, 9, 4, 10])
    assert padded(items, first, end, 4, 0, "left", 1).tolist() == [
        [0, 1, 2, 3], [6, 7, 8, 9], [0, 0, 0, 0], [0, 0, 0, 10],
    ]  # fmt: skip
    assert padded(items, first, end, 4, -1, "right").tolist() == [
        [0, 1, 2, -1], [5, 6, 7, 8], [-1, -1, -1, -1], [9, -1, -1, -1],
    ]  # fmt: skip
    flat, starts = packed(items, first, end, 1)
    assert flat.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert starts.tolist() == [0, 3, 9, 9, 10]
    pairs = cells(items, first, end)
    assert pairs.rows.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 3]


def test_movielens_has_the_published_cores(movielens) -> None:
    small, rounds = k_core(movielens.sequences("ml_100k"), 5, 5)
    assert (len(small), small.num_items, len(small.items), rounds) == (943, 1349, 99_287, 1)
    large, _ = k_core(movielens.sequences("ml_1m"), 5, 5)
    assert (len(large), large.num_items, len(large.items)) == (6040, 3416, 999_611)
