"""Optimizers of the domains that need no groups by layer: Adam and AdamW, and a rate by step or by figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from manyheads.core.errors import UsageError
from manyheads.core.training import make_averaging, run_steps


@dataclass(frozen=True)
class Optimizer:
    """Adam or AdamW, and the learning rate by step. Vectors and biases are not decayed.

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
        kind: "adamw" takes the decay off the weights; "adam" adds it to the gradients, as older recipes do.
        decayed: "matrices", all of them, or the "first" alone, as the GCN of the citation graphs.
    """

    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    schedule: Literal["cosine", "inverse_root", "constant"] = "cosine"
    warmup_steps: int = 500
    min_lr: float = 0.01
    ema_decay: float = 0.0
    kind: Literal["adamw", "adam"] = "adamw"
    decayed: Literal["matrices", "first"] = "matrices"

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


@dataclass(frozen=True)
class Plateau:
    """A rate that falls when a run gets no better, as published recipes do; goes with "constant".

    Args:
        patience: Validations without a better figure that are borne; the rate falls after the next. 0 for
            never.
        factor: What the rate is multiplied by.
        stop_below: A rate that ends the run; 0 for none.
    """

    patience: int = 0
    factor: float = 0.5
    stop_below: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("patience", self.patience >= 0, "0 or more"),
            ("factor", 0 < self.factor < 1, "above 0 and below 1"),
            ("stop_below", self.stop_below >= 0, "0 or more"),
        ):
            if not holds:
                raise UsageError(f"plateau.{name} must be {wanted}")
        if self.stop_below and not self.patience:
            raise UsageError("plateau.stop_below needs plateau.patience: the rate never falls without it")


NEVER = Plateau()  # the rate goes by step alone


def make_optimizer(model: nn.Module, options: Optimizer) -> Adam:
    """Return Adam or AdamW over all parameters, in two groups."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    decayed = matrices[:1] if options.decayed == "first" else matrices
    known = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]
    make = AdamW if options.kind == "adamw" else Adam
    return make(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


def make_schedule(optimizer: Adam, options: Optimizer, steps: int) -> LambdaLR:
    """Return a schedule that is stepped with the optimizer.

    Args:
        steps: Optimizer steps of the whole run; only "cosine" asks.

    Raises:
        UsageError: The rise takes the whole run.
    """
    if options.schedule == "cosine" and steps <= options.warmup_steps:
        raise UsageError(f"optimizer.warmup_steps {options.warmup_steps} are the whole run of {steps} steps")
    return LambdaLR(optimizer, partial(rate, options, steps))


def configure(
    model: nn.Module, options: Optimizer, plateau: Plateau, trainer: Trainer, batches: int
) -> OptimizerLRScheduler:
    """Return what a task's `configure_optimizers` does: the optimizer, and a schedule by step.

    Where the rate falls by the plateau there is no schedule.

    Args:
        batches: Of an epoch.

    Raises:
        UsageError: The run has no end that the schedule needs.
    """
    optimizer = make_optimizer(model, options)
    if plateau.patience:
        return optimizer
    steps, _ = run_steps(trainer, batches)
    schedule = make_schedule(optimizer, options, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_callbacks(
    options: Optimizer, plateau: Plateau, trainer: Trainer, monitor: tuple[str, Literal["min", "max"]]
) -> list[Callback]:
    """Return what a task's `configure_callbacks` does: averaged weights and a falling rate, if wanted."""
    found: list[Callback] = []
    if options.ema_decay:
        found.append(make_averaging(options.ema_decay, trainer.strategy.root_device))
    if plateau.patience:
        found.append(Falling(plateau, *monitor))
    return found


def check_plateau(options: Optimizer, plateau: Plateau) -> None:
    """Refuse two rules for one rate.

    Raises:
        UsageError: There are two.
    """
    if plateau.patience and (options.schedule != "constant" or options.warmup_steps):
        raise UsageError("plateau.patience needs optimizer.schedule: constant and optimizer.warmup_steps: 0")


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


class Falling(Callback):
    """Lets the rate fall behind a validation, and ends the run below a rate.

    It stands in the checkpoint of the epoch that it judged, unlike lightning's own, which comes after it; so
    a resumed run falls at the same epoch.

    Args:
        options: When and how far.
        figure: What is watched.
        mode: Which of its values are better.
    """

    def __init__(self, options: Plateau, figure: str, mode: Literal["min", "max"]) -> None:
        self.options, self.figure, self.mode = options, figure, mode
        self._watch: ReduceLROnPlateau | None = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of the optimizer."""
        self._watch = ReduceLROnPlateau(
            trainer.optimizers[0], self.mode, self.options.factor, self.options.patience, threshold=0, eps=0
        )
        if self._state is not None:
            self._watch.load_state_dict(self._state)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge an epoch."""
        if self._watch is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._watch.step(float(trainer.callback_metrics[self.figure]))
        if max(group["lr"] for group in trainer.optimizers[0].param_groups) < self.options.stop_below:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What was the best, and since when."""
        return {} if self._watch is None else self._watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold that until training starts."""
        self._state = state_dict or None
