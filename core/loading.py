"""Which samples come in which batch: an order by (seed, epoch) alone, and a position to go on from.

What makes batches of samples (windows of series, images) is the domain's. Its loader asks a `Schedule` here,
or is a `BatchLoader`, which also makes batches in worker processes. Lightning sets the epoch (it looks for
`sampler.set_epoch`) and stores a loader's `state_dict` in its checkpoints, so that a fit resumes at the right
batch of the right order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from manyheads.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Indices = NDArray[np.integer]
Job = tuple[Any, ...]  # what a batch is made of: the arguments of the function that makes it
R = TypeVar("R")  # what that function returns
B = TypeVar("B")  # a batch


def share_of(trainer: Trainer | None) -> tuple[int, int]:
    """Return this process' number and how many there are; a data module without a trainer is alone."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


class Schedule:
    """The batches of each epoch as sample numbers, and how many of them were given.

    Args:
        samples: How many samples there are.
        batch_size: Samples a batch.
        shuffle: Draw a new order each epoch.
        drop_last: Leave out a last batch that is not full.
        seed: Seed of the order.
        part: This process and the number of processes. Each has every so-many-th sample of what one process
            would have in a batch of `batch_size` times their number; so each sample comes once, and all
            have as many batches. What is left at the end and too little for all of them joins the last batch.
        weights: Draw as many samples as there are with these chances, with replacement, instead of an order.

    Shape:
        weights `[samples]`, positive.

    Raises:
        UsageError: There are fewer samples than processes.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        weights: NDArray[np.floating] | None = None,
    ) -> None:
        self.samples, self.batch_size, self.shuffle, self.drop_last = samples, batch_size, shuffle, drop_last
        self.seed, self.part, self.weights = seed, part, weights
        self.epoch, self._given, self._resumed = 0, 0, False
        if 0 < samples < part[1]:
            raise UsageError(f"{samples} samples or batches cannot be shared by {part[1]} processes")

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes; a saved position of another epoch is dropped."""
        if epoch != self.epoch:
            self.epoch, self._given, self._resumed = epoch, 0, False

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self._together)
        return full + (rest >= self.part[1] and not self.drop_last)

    @property
    def _together(self) -> int:
        """Samples of a batch, of all processes together."""
        return self.batch_size * self.part[1]

    def order(self, epoch: int) -> Indices:
        """Return the order of the samples in an epoch, of all processes together."""
        n = self.samples
        kind = np.int32 if n < 1 << 31 else np.int64
        if self.weights is not None:
            draws = np.random.default_rng([self.seed, epoch]).random(n) * self.weights.sum()
            return np.searchsorted(np.cumsum(self.weights), draws, side="right").clip(0, n - 1).astype(kind)
        order: Indices = np.arange(n, dtype=kind)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order

    def plan(self, first: int = 0) -> Iterator[Indices]:
        """Yield the sample numbers of this epoch's batches, from one of them on; the position stays."""
        (rank, world), size, last = self.part, self._together, len(self) - 1
        drawn = self.shuffle or self.weights is not None
        order = self.order(self.epoch) if drawn else None
        for i in range(first, last + 1):
            end = self.samples if i == last and not self.drop_last else (i + 1) * size
            mine = slice(i * size + rank, end, world)
            yield np.arange(mine.start, mine.stop, world) if order is None else order[mine]

    def begin(self) -> int:
        """Begin an epoch: return its first batch, which is not 0 where a saved position goes on."""
        first = self._given if self._resumed else 0
        self._given, self._resumed = first, False
        return first

    def give(self) -> None:
        """Count a batch, before it is handed over."""
        self._given += 1

    def end(self) -> None:
        """End an epoch."""
        self.epoch, self._given = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, the batches already given in it, and how large these are."""
        return {"epoch": self.epoch, "batch": self._given, "size": self._together}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position.

        Raises:
            UsageError: It lies within an epoch of batches of another size.
        """
        done = state["batch"] >= len(self)
        if not done and state["batch"] and state["size"] != self._together:
            raise UsageError(
                f"the checkpoint lies within an epoch of batches of {state['size']} over all processes, "
                f"and these are of {self._together}: resume with the same batch size times processes"
            )
        self.epoch, self._given = (state["epoch"] + 1, 0) if done else (state["epoch"], state["batch"])
        self._resumed = True


class _Made(Dataset[R]):
    """What a worker process runs: jobs to what is made of them."""

    def __init__(self, make: Callable[..., R]) -> None:
        self.make = make

    def __getitem__(self, job: Job) -> R:
        return self.make(*job)


class _Jobs:
    """The jobs that remain of an epoch, asked anew for each."""

    def __init__(self, schedule: Schedule, plan: Callable[[int], Iterator[Job]]) -> None:
        self.schedule, self.plan, self.first = schedule, plan, 0

    def __len__(self) -> int:
        return len(self.schedule) - self.first

    def __iter__(self) -> Iterator[Job]:
        return self.plan(self.first)


def _unchanged(made: Any) -> Any:
    """Collate nothing: a worker's answer is whole already."""
    return made


class BatchLoader(Generic[R, B]):
    """Batches by a schedule, made in this process or by workers; it resumes at a saved position.

    Args:
        schedule: Counts the batches.
        plan: Gives the jobs of the schedule's epoch from a batch on.
        make: Makes a job's batch, or what `accept` takes for one; the same for the same job.
        accept: Sees what was made, in order, in this process; gives the batch, or None to pass over it.
        workers: Worker processes; 0 makes the batches here.
    """

    batch_sampler = None  # Lightning reads it of whatever has a `sampler`

    def __init__(
        self,
        schedule: Schedule,
        plan: Callable[[int], Iterator[Job]],
        make: Callable[..., R],
        accept: Callable[[R], B | None],
        workers: int = 0,
    ) -> None:
        self.schedule, self.accept, self.workers = schedule, accept, workers
        self._made, self._jobs = _Made(make), _Jobs(schedule, plan)
        self._pool: DataLoader[R] | None = None

    @property
    def sampler(self) -> Schedule:
        """Where Lightning looks for `set_epoch`."""
        return self.schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def _results(self) -> Iterator[R]:
        if not self.workers:
            return (self._made[job] for job in self._jobs)
        if self._pool is None:
            self._pool = DataLoader(
                self._made,
                batch_size=None,
                sampler=self._jobs,
                num_workers=self.workers,
                collate_fn=_unchanged,
                persistent_workers=True,
            )
        return iter(self._pool)

    def __iter__(self) -> Iterator[B]:
        # A generator's body begins with the first batch: `set_epoch` may come between `iter` and that.
        self._jobs.first = self.schedule.begin()
        for made in self._results():
            batch = self.accept(made)
            if batch is None and self.schedule.part[1] > 1:
                raise DataError(
                    "a batch has no sample that can be used, and processes that train together must have as "
                    "many batches: take the bad samples out, or use one process"
                )
            self.schedule.give()
            if batch is not None:
                yield batch
        self.schedule.end()

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the batches already given in it."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position."""
        self.schedule.load_state_dict(state)
