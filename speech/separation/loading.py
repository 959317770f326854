"""Mixtures to batches, made here or in worker processes; a batch is a function of (seed, epoch, numbers)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from manyheads.core.errors import UsageError
from manyheads.core.loading import Indices, Schedule
from manyheads.speech.separation.mixing import Mixture


class MixtureBatch(TypedDict):
    """A batch of mixtures."""

    mixture: Tensor  # [B, L] float32, zeros behind the shorter ones
    sources: Tensor  # [B, N, L]
    lengths: Tensor  # [B]
    index: Tensor  # [B], numbers in the part
    ids: list[str]


class Mixtures(Protocol):
    """Mixtures by number, the same each time; those of training are others each epoch."""

    @property
    def source(self) -> str:
        """Where they come from."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Mixture:
        """Return one."""


@dataclass(frozen=True)
class Loading:
    """How mixtures are loaded.

    Args:
        epoch_mixtures: Mixtures of an epoch of training.
        val_mixtures: Mixtures of a validation.
        test_mixtures: Mixtures of a test.
        eval_batch_size: Mixtures a batch in validation and test.
        workers: Processes that mix; 0 does it in training's own.
        cache_mib: Recordings are kept in memory if all of a part take no more than this.
    """

    epoch_mixtures: int = 1000
    val_mixtures: int = 50
    test_mixtures: int = 200
    eval_batch_size: int = 1
    workers: int = 0
    cache_mib: int = 1024

    def __post_init__(self) -> None:
        for name in ("epoch_mixtures", "val_mixtures", "test_mixtures", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"loading.{name} must be 1 or more, not {getattr(self, name)}")
        if self.workers < 0 or self.cache_mib < 0:
            raise UsageError("loading.workers and loading.cache_mib must be 0 or more")


def gather(mixtures: Mixtures, indices: Indices, epoch: int) -> MixtureBatch:
    """Return a batch; shorter mixtures are filled up with zeros."""
    found = [mixtures.sample(index, epoch) for index in indices.tolist()]
    sources = pad_sequence([each.sources.T for each in found], batch_first=True)  # [B, L, N]
    return {
        "mixture": pad_sequence([each.mixture for each in found], batch_first=True),
        "sources": sources.transpose(1, 2).contiguous(),
        "lengths": torch.tensor([len(each.mixture) for each in found]),
        "index": torch.from_numpy(indices.astype("int64")),
        "ids": [each.id for each in found],
    }


Job = tuple[int, Indices]  # epoch, numbers of mixtures


class _Batches(Dataset[MixtureBatch]):
    """What a worker process runs: jobs to batches."""

    def __init__(self, mixtures: Mixtures) -> None:
        self.mixtures = mixtures

    def __getitem__(self, job: Job) -> MixtureBatch:
        epoch, indices = job
        return gather(self.mixtures, indices, epoch)


class _Jobs:
    """The jobs that remain of an epoch, asked anew for each."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.first = schedule, 0

    def __len__(self) -> int:
        return len(self.schedule) - self.first

    def __iter__(self) -> Iterator[Job]:
        epoch = self.schedule.epoch
        for indices in self.schedule.plan(self.first):
            yield epoch, indices


def _unchanged(batch: Any) -> Any:
    """Collate nothing: a worker's answer is a batch already."""
    return batch


class MixtureLoader:
    """Batches of a part, made in this process or by workers; it resumes at a saved position.

    Args:
        mixtures: What the batches are made of.
        schedule: Which come when.
        workers: Worker processes; 0 mixes here.
    """

    batch_sampler = None  # Lightning reads it of whatever has a `sampler`

    def __init__(self, mixtures: Mixtures, schedule: Schedule, workers: int = 0) -> None:
        self.mixtures, self.schedule, self.workers = mixtures, schedule, workers
        self._jobs = _Jobs(schedule)
        self._pool: DataLoader[MixtureBatch] | None = None

    @property
    def sampler(self) -> Schedule:
        """Where Lightning looks for `set_epoch`."""
        return self.schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def _results(self) -> Iterator[MixtureBatch]:
        batches = _Batches(self.mixtures)
        if not self.workers:
            return (batches[job] for job in self._jobs)
        if self._pool is None:
            self._pool = DataLoader(
                batches,
                batch_size=None,
                sampler=self._jobs,
                num_workers=self.workers,
                collate_fn=_unchanged,
                persistent_workers=True,
            )
        return iter(self._pool)

    def __iter__(self) -> Iterator[MixtureBatch]:
        # A generator's body begins with the first batch: `set_epoch` may come between `iter` and that.
        self._jobs.first = self.schedule.begin()
        for batch in self._results():
            self.schedule.give()
            yield batch
        self.schedule.end()

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the batches already given in it."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position."""
        self.schedule.load_state_dict(state)
