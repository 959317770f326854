"""Schedules: each sample once over all processes, as many batches each, and positions to go on from."""

import numpy as np
import pytest

from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import BatchLoader, Schedule


def of_all(schedules: list[Schedule]) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in schedule.plan()] for schedule in schedules]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [3, 7, 8, 24, 25, 29, 31])
def test_processes_share_every_sample_once(samples: int, world: int, shuffle: bool) -> None:
    shares = [Schedule(samples, 4, shuffle, seed=5, part=(rank, world)) for rank in range(world)]
    plans = of_all(shares)
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(samples))
    assert {len(plan) for plan in plans} == {len(shares[0])}
    assert all(batch for plan in plans for batch in plan)


@pytest.mark.parametrize("samples", [24, 25, 31])
def test_a_step_of_all_processes_is_one_of_a_single_one(samples: int) -> None:
    single = Schedule(samples, 8, True, True, seed=5)
    pair = of_all([Schedule(samples, 4, True, True, seed=5, part=(rank, 2)) for rank in range(2)])
    together = [sorted(one + other) for one, other in zip(*pair, strict=True)]
    assert together == [sorted(batch.tolist()) for batch in single.plan()]
    assert sum(map(len, together)) == samples // 8 * 8


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(UsageError, match="2 samples or batches cannot be shared by 3 processes"):
        Schedule(2, 4, part=(0, 3))


def test_a_position_within_an_epoch_is_of_batches_of_its_size() -> None:
    schedule = Schedule(24, 4, part=(0, 2))
    schedule.begin()
    schedule.give()
    state = schedule.state_dict()
    Schedule(24, 8).load_state_dict(state)  # the same eight samples a step
    with pytest.raises(UsageError, match="batches of 8 over all processes, and these are of 4"):
        Schedule(24, 4).load_state_dict(state)
    Schedule(24, 4).load_state_dict({"epoch": 3, "batch": 0, "size": 8})  # an epoch's end fits any


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_shared_without_loss(world: int, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 20, 41)
    shares = [Buckets(sizes, 60, 4, True, seed, (rank, world), most=6) for rank in range(world)]
    plans = [[batch.tolist() for batch in share.plan()] for share in shares]
    assert sorted(i for plan in plans for batch in plan for i in batch) == list(range(41))
    assert {len(plan) for plan in plans} == {len(shares[0])}
    for plan in plans:
        for batch in plan:
            assert len(batch) <= 6
            assert sizes[batch].max() * len(batch) <= 60


def test_a_batch_of_bad_samples_alone_stops_processes_that_would_wait_for_it() -> None:
    def loader(world: int) -> BatchLoader[int, int]:
        schedule = Schedule(8, 2, part=(0, world))
        jobs = lambda first: ((i,) for i in range(first, len(schedule)))  # noqa: E731
        return BatchLoader(schedule, jobs, int, lambda made: None if made == 1 else made)

    assert list(loader(1)) == [0, 2, 3]
    with pytest.raises(DataError, match="must have as many batches"):
        list(loader(2))
