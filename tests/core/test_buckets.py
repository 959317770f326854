"""Batches of samples of like size: bounded, each sample once, others each epoch, a share a process."""

from itertools import pairwise

import numpy as np
import pytest

from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError


def test_batches_are_bounded_and_use_each_sample_once() -> None:
    seconds = np.random.default_rng(0).lognormal(1.0, 0.8, 1000).clip(0.3, 25)
    buckets = Buckets(seconds, 60.0, 12, True, 3)
    epochs = []
    for epoch in range(3):
        buckets.schedule.set_epoch(epoch)
        plan = [batch.tolist() for batch in buckets.plan()]
        assert len(plan) == len(buckets)
        assert sorted(i for batch in plan for i in batch) == list(range(1000))
        assert all(seconds[batch].max() * len(batch) <= 60 + 1e-9 for batch in plan)
        padded = sum(seconds[batch].max() * len(batch) for batch in plan)
        assert padded < 1.3 * seconds.sum()  # 3 times as many in batches by chance
        epochs.append(plan)
    assert epochs[0] != epochs[1]
    assert {tuple(sorted(b)) for b in epochs[0]} != {tuple(sorted(b)) for b in epochs[1]}
    fixed = Buckets(seconds, 60.0, 12)
    longest = [seconds[batch].max() for batch in fixed.plan()]
    assert all(a >= b for a, b in pairwise(longest))


@pytest.mark.parametrize(("limit", "buckets"), [(None, 1), (None, 8), (500, 1), (500, 8)])
def test_whole_numbers_are_bounded_by_count_and_by_size(limit: float | None, buckets: int) -> None:
    nodes = np.random.default_rng(1).integers(5, 80, 777)
    found = Buckets(nodes, limit, buckets, True, most=32)
    batches = list(found.plan())
    assert sorted(np.concatenate(batches).tolist()) == list(range(777))
    assert max(map(len, batches)) <= 32
    if limit is None:
        assert max(map(len, batches)) == 32
    else:
        assert max(nodes[batch].max() * len(batch) for batch in batches) <= limit


def test_several_processes_share_the_batches() -> None:
    seconds = np.random.default_rng(0).uniform(1, 9, 200)
    shares = [Buckets(seconds, 30.0, 5, True, 0, (rank, 2)) for rank in range(2)]
    plans = [[i for batch in share.plan() for i in batch.tolist()] for share in shares]
    assert len(shares[0]) == len(shares[1])
    assert not set(plans[0]) & set(plans[1])


def test_what_makes_no_batch_is_refused() -> None:
    sizes = np.array([3.0, 8.0])
    with pytest.raises(UsageError, match="a sample takes 8, and a batch at most 5"):
        Buckets(sizes, 5.0)
    with pytest.raises(DataError, match="nothing to make batches of"):
        Buckets(sizes[:0], 5.0)
