"""Mixtures to batches, made here or in worker processes; a batch is a function of (seed, epoch, numbers)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manyheads.core.errors import UsageError
from manyheads.core.loading import BatchLoader, Indices, Job, Schedule
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


MixtureLoader = BatchLoader[MixtureBatch, MixtureBatch]


def mixture_loader(mixtures: Mixtures, schedule: Schedule, workers: int = 0) -> MixtureLoader:
    """Return the batches of a part.

    Args:
        mixtures: What the batches are made of.
        schedule: Which come when.
        workers: Worker processes; 0 mixes here.
    """

    def jobs(first: int) -> Iterator[Job]:
        epoch = schedule.epoch
        return ((indices, epoch) for indices in schedule.plan(first))

    return BatchLoader(schedule, jobs, partial(gather, mixtures), lambda batch: batch, workers)
