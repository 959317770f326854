"""What a run of a model of texts does one after the other, and the learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from manyheads.core import optimization
from manyheads.core.errors import UsageError
from manyheads.core.optimization import Optimizer

Stage = Literal["pretrain", "refresh", "keep"]


@dataclass(frozen=True)
class Stages:
    """What a run does, one after the other; what is left of trainer.max_epochs keeps the table.

    Args:
        pretrain: Epochs in which histories and their next items, both read, find each other in a batch.
        refresh: Epochs of fine-tuning over the whole catalogue, whose table is encoded anew before each. The
            best epoch so far is where the rest goes on from, with its table.
        language: Weight of the words that pretraining hides and guesses, in histories and in items; 0 hides
            none, and takes half the time.
        mask_rate: Which share of a text is hidden.
        batch_items: How items of a batch count in pretraining: as they come, popular ones more often
            ("plain", as published), or by their chances ("corrected"), so that they stand for all items.
        negatives: Items drawn a batch that fine-tuning's targets are held against; 0 for all.
        pretrain_rate: Pretraining's learning rate, as a multiple of the optimizer's. The rate rises, and
            falls by the schedule, in each stage.
    """

    pretrain: int = 0
    refresh: int = 10
    language: float = 0.1
    mask_rate: float = 0.15
    batch_items: Literal["plain", "corrected"] = "plain"
    negatives: int = 0
    pretrain_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("pretrain", self.pretrain >= 0, "0 or more"),
            ("refresh", self.refresh >= 0, "0 or more"),
            ("language", self.language >= 0, "0 or more"),
            ("mask_rate", 0 < self.mask_rate < 1, "above 0 and below 1"),
            ("negatives", self.negatives >= 0, "0 or more"),
            ("pretrain_rate", self.pretrain_rate > 0, "above 0"),
        ):
            if not holds:
                raise UsageError(f"stages.{name} must be {wanted}")

    @property
    def words(self) -> bool:
        """Whether words are guessed."""
        return self.pretrain > 0 and self.language > 0

    def at(self, epoch: int) -> Stage:
        """Return an epoch's stage."""
        if epoch < self.pretrain:
            return "pretrain"
        return "refresh" if epoch < self.pretrain + self.refresh else "keep"

    def begins(self) -> tuple[int, int]:
        """Return the first epochs of the second and third stage."""
        return self.pretrain, self.pretrain + self.refresh


def make_schedule(optimizer: Adam, options: Optimizer, stages: Stages, steps: int, epoch: int) -> LambdaLR:
    """Return a schedule that begins anew with each stage.

    Args:
        optimizer: Of the run.
        options: The rate by step.
        stages: Of the run.
        steps: Of the run.
        epoch: Steps of an epoch.

    Raises:
        UsageError: A stage has no step behind the rise.
    """
    second, third = (begin * epoch for begin in stages.begins())
    edges = [0, second, third, max(third, steps)]
    for first, end in pairwise(edges):
        if options.schedule == "cosine" and 0 < end - first <= options.warmup_steps:
            rise = options.warmup_steps
            raise UsageError(f"optimizer.warmup_steps {rise} are a whole stage of {end - first} steps")

    def rate(step: int) -> float:
        number = max(0, sum(edge <= step for edge in edges[:3]) - 1)
        found = optimization.rate(options, edges[number + 1] - edges[number], step - edges[number])
        return found * (stages.pretrain_rate if step < second else 1.0)

    return LambdaLR(optimizer, rate)
