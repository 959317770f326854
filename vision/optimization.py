"""Optimizers of image classifiers: groups of parameters, rates by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from manyheads.core.errors import UsageError


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its groups of parameters. Vectors, biases and what the model names are not decayed.

    Args:
        learning_rate: The rate of the last layers, at its highest.
        weight_decay: Decay of the matrices.
        layer_decay: What a layer's rate is multiplied by for each layer after it; 1 gives all the same.
        beta1: Decay of the mean of the gradients.
        beta2: Decay of the mean of their squares.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999


@dataclass(frozen=True)
class Schedule:
    """The learning rate by optimizer step.

    Args:
        kind: cosine rises linearly and falls to min_lr; constant rises and stays; onecycle rises and falls
            along cosines.
        warmup_epochs: Epochs of the rise; parts of one are allowed.
        min_lr: What is left at the end, as a share of the highest rate.
    """

    kind: Literal["cosine", "constant", "onecycle"] = "cosine"
    warmup_epochs: float = 5.0
    min_lr: float = 0.01


def check(optimizer: Optimizer, schedule: Schedule) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        UsageError: Which one.
    """
    for name, holds, wanted in (
        ("optimizer.learning_rate", optimizer.learning_rate > 0, "above 0"),
        ("optimizer.weight_decay", optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.layer_decay", 0 < optimizer.layer_decay <= 1, "above 0 and at most 1"),
        ("optimizer.beta1", 0 <= optimizer.beta1 < 1, "from 0 to below 1"),
        ("optimizer.beta2", 0 <= optimizer.beta2 < 1, "from 0 to below 1"),
        ("schedule.warmup_epochs", schedule.warmup_epochs >= 0, "0 or more"),
        ("schedule.min_lr", 0 <= schedule.min_lr <= 1, "from 0 to 1"),
    ):
        if not holds:
            raise UsageError(f"{name} must be {wanted}")


def make_optimizer(model: nn.Module, options: Optimizer) -> AdamW:
    """Return AdamW over the parameters that are trained, in groups by timm's rules.

    Raises:
        UsageError: Nothing is left to train, or the layers cannot be told apart.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("the model has no parameters to train")
    kept: set[str] = getattr(model, "no_weight_decay", set)()
    if options.layer_decay == 1:
        groups = param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=kept)
    else:
        if not hasattr(model, "group_matcher"):
            raise UsageError("optimizer.layer_decay needs a model that names its layers (group_matcher)")
        groups = param_groups_layer_decay(
            model, options.weight_decay, no_weight_decay_list=kept, layer_decay=options.layer_decay
        )
    for group in groups:
        group["lr"] = options.learning_rate * group.pop("lr_scale", 1.0)
    betas = (options.beta1, options.beta2)
    return AdamW(groups, lr=options.learning_rate, betas=betas, fused=True)


def make_schedule(optimizer: AdamW, options: Schedule, steps: int, epoch: int) -> LambdaLR:
    """Return a schedule that is stepped with the optimizer.

    Args:
        optimizer: Its groups keep their proportions.
        options: The curve.
        steps: Optimizer steps of the whole run.
        epoch: Optimizer steps of an epoch.

    Raises:
        UsageError: The rise takes the whole run.
    """
    warmup = round(options.warmup_epochs * epoch)
    if 0 < steps <= warmup:
        raise UsageError(
            f"schedule.warmup_epochs {options.warmup_epochs:g} are {warmup} steps, the whole run of {steps}"
        )
    return LambdaLR(optimizer, partial(rate, options, steps, warmup))


def rate(options: Schedule, steps: int, warmup: int, step: int) -> float:
    """Return a step's learning rate as a share of the highest."""
    if step < warmup:
        risen = (step + 1) / (warmup + 1)
        return (1 - math.cos(math.pi * risen)) / 2 if options.kind == "onecycle" else risen
    if options.kind == "constant":
        return 1.0
    left = (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))) / 2
    return options.min_lr + (1 - options.min_lr) * left
