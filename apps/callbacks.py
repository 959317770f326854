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
from manyheads.core.training import of_all

RandomState = tuple[torch.Tensor, torch.Tensor | None]  # of a process, and of its GPU


class Resumable(Checkpoint):
    """Save the run's whole state after each epoch, after so many steps, and on SIGTERM and SIGINT.

    Random state included. (Lightning's own `save_last` saves an epoch only where it is the best so far.)

    A run that was stopped or killed and resumed gives the same weights, bit for bit, as one that was not,
    on a CPU (its first `train_loss` is that of the batches that were left of the epoch). Lightning calls a
    `Checkpoint` after the task's own: averaged weights have that step then.

    Args:
        checkpoint: The file.
        every: Optimizer steps between two checkpoints within an epoch; 0 for none.
        seed: Of the run. Of several processes each draws numbers of its own.
    """

    def __init__(self, checkpoint: Path, every: int = 0, seed: int = 0) -> None:
        self.checkpoint, self.every, self.seed = checkpoint, every, seed
        self._stopping = Stopping()
        self._rng_states: list[RandomState] = []  # of all processes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from lightning, and restore the random state of a resumed run."""
        self._stopping.__enter__()
        rank, world = trainer.global_rank, trainer.world_size
        if len(self._rng_states) == world:
            cpu, cuda = self._rng_states[rank]
            torch.set_rng_state(cpu)
            if cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda)
        elif world > 1:
            torch.manual_seed(self.seed + 100_003 * rank)  # up to here all drew the same: the weights

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stopping.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if a signal came or it is time; the last batch of an epoch is left to its validation.

        Gradients that are still accumulated are in no checkpoint: their step comes first.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch:
            return
        signum = self._signal(trainer, pl_module)
        if signum or (self.every and trainer.global_step % self.every == 0):
            self._save(trainer)
        if signum:
            raise Stopped(signum, f"; go on with --ckpt_path {self.checkpoint}")

    def _signal(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Return the signal that came, 0 for none; one that came to any process stops all at once."""
        signum = self._stopping.signum or 0
        if trainer.world_size == 1:
            return signum
        noted = torch.tensor(signum, device=pl_module.device)
        return int(trainer.strategy.reduce(noted, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        """Write the log first: what a killed run had measured is drawn with what comes after."""
        if trainer.logger is not None:
            trainer.logger.save()
        trainer.save_checkpoint(self.checkpoint)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch; `ModelCheckpoint`, which stands before this one, has judged it."""
        self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random state: dropout must go on where it was."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        checkpoint["rng_states"] = of_all(trainer, [(torch.get_rng_state(), cuda)])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the random state until training starts."""
        self._rng_states = checkpoint["rng_states"]


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
        """Print the epoch's figures, of several processes the first one alone."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in self._figures if name in metrics)
        seconds = time.perf_counter() - self._start
        total = trainer.max_epochs
        print(
            f"epoch {trainer.current_epoch + 1:>2}/{total}  {figures}  lr {self._rate:.2e}  {seconds:.1f} s",
            flush=True,
        )
