"""The optimizer of the speech tasks: AdamW, and a rate by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from manyheads.core.errors import UsageError


@dataclass(frozen=True)
class Optimizer:
    """AdamW, and the learning rate by step. Vectors and biases are not decayed.

    Args:
        learning_rate: The highest rate.
        weight_decay: Decay of the matrices.
        beta1: Decay of the mean of the gradients.
        beta2: Decay of the mean of their squares.
        schedule: "cosine" falls to min_lr; "inverse_root" with the root of the step, as published recipes do;
            "constant" stays.
        warmup_steps: Steps in which the rate rises.
        min_lr: What is left at the end of "cosine", as a share of the highest rate.
        ema_decay: Decay of the averaged weights, which are the ones validated and saved; 0 for none.
    """

    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    schedule: Literal["cosine", "inverse_root", "constant"] = "cosine"
    warmup_steps: int = 500
    min_lr: float = 0.01
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("beta1", 0 <= self.beta1 < 1, "from 0 to below 1"),
            ("beta2", 0 <= self.beta2 < 1, "from 0 to below 1"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("min_lr", 0 <= self.min_lr <= 1, "from 0 to 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
        ):
            if not holds:
                raise UsageError(f"optimizer.{name} must be {wanted}")


def make_optimizer(model: nn.Module, options: Optimizer) -> AdamW:
    """Return AdamW over all parameters, in two groups."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


def make_schedule(optimizer: AdamW, options: Optimizer, steps: int) -> LambdaLR:
    """Return a schedule that is stepped with the optimizer.

    Args:
        steps: Optimizer steps of the whole run; only "cosine" asks.

    Raises:
        UsageError: The rise takes the whole run.
    """
    if options.schedule == "cosine" and steps <= options.warmup_steps:
        raise UsageError(f"optimizer.warmup_steps {options.warmup_steps} are the whole run of {steps} steps")
    return LambdaLR(optimizer, partial(rate, options, steps))


def rate(options: Optimizer, steps: int, step: int) -> float:
    """Return a step's learning rate as a share of the highest."""
    warmup = options.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "inverse_root":
        return math.sqrt(max(1, warmup) / max(1, step))
    left = (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2
    return options.min_lr + (1 - options.min_lr) * left
