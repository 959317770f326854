"""Lightning callbacks of a training run: a line an epoch, and stopping so that the run can go on later."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from manyheads.apps.stopping import Stopped, Stopping
from manyheads.core.errors import UsageError


class Resumable(Checkpoint):
    """Save the run's whole state after each epoch, and on SIGTERM and SIGINT between two batches.

    Random state included. (Lightning's own `save_last` saves an epoch only where it is the best so far.)

    A run that was stopped and resumed gives the same weights, bit for bit, as one that was not (on a CPU).
    Lightning calls a `Checkpoint` after the task's own callbacks: averaged weights have that step then.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._stopping = Stopping()
        self._rng_state: torch.Tensor | None = None
        self._cuda_rng_state: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from lightning, and restore the random state of a resumed run."""
        self._stopping.__enter__()
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)
            if self._cuda_rng_state and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(self._cuda_rng_state)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stopping.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this batch, if a signal came; the last one of an epoch is left to its validation.

        Gradients that are still accumulated are in no checkpoint: their step comes first.
        """
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._stopping.signum is not None and stepped and not trainer.is_last_batch:
            trainer.save_checkpoint(self.checkpoint)
            raise Stopped(self._stopping.signum, f"; go on with --ckpt_path {self.checkpoint}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch; `ModelCheckpoint`, which stands before this one, has judged it."""
        trainer.save_checkpoint(self.checkpoint)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random state: dropout must go on where it was."""
        checkpoint["rng_state"] = torch.get_rng_state()
        checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the random state until training starts."""
        self._rng_state = checkpoint.get("rng_state")
        self._cuda_rng_state = checkpoint.get("cuda_rng_state", [])


class Validated(Callback):
    """Refuse a run that would end before its first validation: it would have no best checkpoint."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the run's epochs and steps with those before a validation."""
        every = trainer.check_val_every_n_epoch or 1
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < every:
            raise UsageError(
                f"trainer.max_epochs {trainer.max_epochs} ends before the first validation, after {every}: "
                "raise it, or lower trainer.check_val_every_n_epoch"
            )
        first = every * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if 0 <= trainer.max_steps < first:
            raise UsageError(
                f"trainer.max_steps {trainer.max_steps} ends before the first validation, at step {first}: "
                "raise it, or shorten the epochs with trainer.limit_train_batches"
            )


class EpochLines(Callback):
    """Print one line an epoch: losses, the figure that says which epoch is best, learning rate, seconds."""

    def __init__(self, figure: str = "val_loss") -> None:
        self._figures = tuple(dict.fromkeys(("train_loss", "val_loss", figure)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin; a run resumed within an epoch has no start of that epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock, and note the highest rate before the scheduler moves it."""
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self._start, self._rate = time.perf_counter(), max(rates)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's figures."""
        metrics = trainer.callback_metrics
        figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in self._figures if name in metrics)
        seconds = time.perf_counter() - self._start
        total = trainer.max_epochs
        print(
            f"epoch {trainer.current_epoch + 1:>2}/{total}  {figures}  lr {self._rate:.2e}  {seconds:.1f} s",
            flush=True,
        )
