"""What the training tasks of several domains share: the steps of a run, averaged weights."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils import _pytree as pytree

from manyheads.core.errors import UsageError

T = TypeVar("T")


def of_all(trainer: Trainer, found: list[T]) -> list[T]:
    """Return what all processes have found, the first one's before the second's; of one process as it is.

    Args:
        trainer: Of the run; all processes call this.
        found: Of this process. Tensors of several processes come back on the CPU.
    """
    if trainer.world_size == 1:
        return found
    shares: list[list[T]] = [[]] * trainer.world_size
    own = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), found)
    torch.distributed.all_gather_object(shares, own)
    return [each for share in shares for each in share]


def run_steps(trainer: Trainer, batches: int) -> tuple[int, int]:
    """Return the optimizer steps of the whole run, and of an epoch.

    Lightning's `estimated_stepping_batches` would set the train loader up before a resumed run's position is
    loaded into it, and so lose that.

    Args:
        trainer: Of the run.
        batches: Of an epoch.

    Raises:
        UsageError: The run has no end.
    """
    limit = trainer.limit_train_batches
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * epoch)
    if not ends:
        raise UsageError("the schedule needs the run's end: trainer.max_epochs or trainer.max_steps")
    return min(ends), epoch


def make_averaging(decay: float, device: torch.device) -> WeightAveraging:
    """Return the callback that validates and keeps an exponential mean of the weights.

    The mean begins short, with `(1 + n) / (10 + n)` after n steps: a run's first weights are soon forgotten.
    Checkpoints hold the mean as the model, and the weights in training beside it.
    """

    def average(averaged: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        n = float(steps)
        keep = min(decay, (1 + n) / (10 + n))
        for mean, now in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(now.to(mean), 1 - keep)
            else:
                mean.copy_(now)  # counters

    return WeightAveraging(device, use_buffers=True, multi_avg_fn=torch.no_grad()(average))
