"""Splits keep the future out of training, and the check that says so sees what it must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from manyheads.core.errors import DataError, UsageError
from manyheads.recsys.logs import make_log
from manyheads.recsys.sequences import Sequences
from manyheads.recsys.splits import Leaks, Split, at_times, by_ratio, by_time, leaks, leave_one_out


def histories(*times: list[int]) -> Sequences:
    users = [str(user) for user, row in enumerate(times) for _ in row]
    items = [f"{user}.{place}" for user, row in enumerate(times) for place in range(len(row))]
    return Sequences.of(make_log(users, items, np.concatenate(times).astype(np.int64)))


def parts(split: Split) -> list[list[int]]:
    """Lengths of each user's parts."""
    spans = (split.span("train"), split.span("val"), split.span("test"))
    return np.stack([end - first for first, end in spans], 1).tolist()


def test_leave_one_out_asks_for_the_last_two_of_whom_has_three() -> None:
    split = leave_one_out(histories([1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]))
    assert parts(split) == [[1, 0, 0], [2, 0, 0], [1, 1, 1], [3, 1, 1]]
    test, val = split.questions("test"), split.questions("val")
    ids = split.sequences.item_ids.ids
    assert [ids[i] for i in test.targets.items] == ["2.2", "3.4"]
    assert [ids[i] for i in val.targets.items] == ["2.1", "3.3"]
    assert (test.users.tolist(), (test.end - test.first).tolist()) == ([2, 3], [2, 4])
    assert (val.end - val.first).tolist() == [1, 3]
    assert split.counts().tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert str(split) == "leave one out: train 7 of 4 users, val 2 of 2 users, test 2 of 2 users"


def test_ratio_rounds_down_and_leaves_one_to_train_on() -> None:
    split = by_ratio(histories([1], [1, 2], list(range(9)), list(range(10)), list(range(25))))
    assert parts(split) == [[1, 0, 0], [2, 0, 0], [9, 0, 0], [8, 1, 1], [21, 2, 2]]
    assert parts(by_ratio(histories([1, 2, 3]), 0.3, 0.6)) == [[2, 0, 1]]
    assert split.questions("test", "all").targets.rows.tolist() == [0, 1, 1]
    assert split.questions("test", "next").targets.rows.tolist() == [0, 1]
    for val, test in ((0.5, 0.5), (-0.1, 0.1), (0.1, 0.0)):
        with pytest.raises(UsageError, match="shares"):
            by_ratio(split.sequences, val, test)


def test_a_cut_in_time_is_the_same_for_all_and_keeps_equal_times_together() -> None:
    split = at_times(histories([1, 4, 5, 9], [1, 2], [7, 8], [4, 4, 6]), 4, 7)
    assert parts(split) == [[1, 2, 1], [2, 0, 0], [0, 0, 2], [0, 3, 0]]
    # The third has no history, the fourth none to validate with: nothing is asked about them.
    assert split.questions("test").users.tolist() == [0]
    assert split.questions("val").users.tolist() == [0]
    assert leaks(split) == Leaks(0, 0, 0, 3)
    whole = by_time(histories(list(range(60)), list(range(40, 80))), 0.1, 0.2)
    assert parts(whole) == [[55, 5, 0], [15, 5, 20]]
    with pytest.raises(UsageError, match="before validation"):
        at_times(split.sequences, 7, 4)
    with pytest.raises(DataError, match="too many events"):
        by_time(histories([5, 5, 5, 6]), 0.3, 0.3)
    with pytest.raises(DataError, match="no times"):
        by_time(replace(split.sequences, times=None))
    with pytest.raises(DataError, match="leaves no user"):
        at_times(split.sequences, 4, 10).questions("test")


def test_every_split_of_movielens_keeps_its_order_and_only_the_cut_in_time_the_future_out(movielens) -> None:
    sequences = movielens.sequences("ml_100k")
    events = len(sequences.items)
    for split in (leave_one_out(sequences), by_ratio(sequences), by_time(sequences)):
        found = leaks(split)
        assert (found.order, found.overlap) == (0, 0)
        assert sum(map(sum, parts(split))) == events
        if split.kind.startswith("by time"):
            assert found.future == 0
        else:
            assert found.future is not None and found.future > found.training / 2
    assert leaks(leave_one_out(movielens.sequences("ml_1m"))).future is None


def test_the_check_sees_leaks() -> None:
    sequences = histories([1, 2, 3, 4], [1, 2, 3, 4])
    good = leave_one_out(sequences)
    # A test before its validation; a history out of order; a part that reaches into another user.
    assert leaks(replace(good, test=good.val - 1)).overlap > 0
    assert leaks(replace(good, val=np.array([5, 6]), test=np.array([6, 7]))).overlap > 0
    assert sequences.times is not None
    turned = replace(sequences, times=np.array([4, 3, 2, 1, 1, 2, 3, 4]))
    assert leaks(leave_one_out(turned)).order == 1
    late = replace(sequences, times=np.array([1, 3, 2, 4, 1, 2, 3, 4]))  # validation before training's last
    assert leaks(leave_one_out(late)).order == 1
    # The second user's training is later than the first one's test.
    assert leaks(leave_one_out(histories([1, 2, 3], [9, 10, 11, 12]))).future == 2
