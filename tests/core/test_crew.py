"""Threads that share out items and wait for each other in one compiled function."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from manyheads.core import parallel
from manyheads.core.crew import meet, slots, take
from manyheads.core.jit import kernel

ITEMS = 1000


@kernel
def rounds(values, seen, numbers, threads):
    """Each round adds one to all values; its sum is taken behind the meeting, by whoever comes first."""
    for turn in range(seen.size):
        item = take(numbers, 4 * turn)
        while item < values.size:
            values[item] += 1
            item = take(numbers, 4 * turn)
        meet(numbers, 4 * turn + 1, threads)
        if take(numbers, 4 * turn + 2) == 0:
            seen[turn] = values.sum()
        meet(numbers, 4 * turn + 3, threads)


def run() -> np.ndarray:
    values, seen = np.zeros(ITEMS, np.int64), np.zeros(50, np.int64)
    parallel.together(partial(rounds, values, seen, slots(4 * 50)))
    return seen


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_all_see_what_was_written_before_a_meeting(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert run().tolist() == [ITEMS * (turn + 1) for turn in range(50)]
    finally:
        torch.set_num_threads(before)


def test_two_crews_at_once_do_not_wait_for_each_others_threads():
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        callers = [
            threading.Thread(target=lambda: found.append([run() for _ in range(20)])) for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 3
    assert all(seen[-1] == 50 * ITEMS for runs in found for seen in runs)


def test_an_error_comes_back_and_the_next_crew_works():
    def broken(threads: int) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        parallel.together(broken)
    assert run()[-1] == 50 * ITEMS
