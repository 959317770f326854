"""Training again within a backtest, by the run's config, on the rows that are known by then."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar

from manyheads.apps.stopping import Stopping
from manyheads.apps.trainer import CLI, build_trainer
from manyheads.apps.training import load_weights
from manyheads.core.errors import DataError
from manyheads.timeseries.backtest import RollingModel
from manyheads.timeseries.frames import Series
from manyheads.timeseries.layout import Layout
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.treatment import Range, fit_treatment
from manyheads.timeseries.windows import Batch, WindowLoader


@dataclass(frozen=True)
class Refit:
    """A model trained again.

    Args:
        tester: It, with all series treated as its train data were.
        validation: The rows that its training was stopped by.
        about: Its rows, epochs, loss, seed and seconds, in plain JSON.
    """

    tester: RollingModel
    validation: list[Range]
    about: dict[str, object]


class StopBetweenBatches(Callback):
    """Stop a training at once when a signal comes; lightning would end it as if it were done."""

    def __init__(self) -> None:
        self._stopping = Stopping()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals."""
        self._stopping.__enter__()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stopping.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after each batch."""
        self._stopping.check()


def refit(
    cli: CLI,
    of: Preprocessing,
    series: Sequence[Series],
    cutoffs: Sequence[int],
    held: Sequence[int],
    layout: Layout,
    seed: int,
) -> Refit:
    """Train a config's model on all rows before a window.

    The last of them are for validation, as many as the run has; scaling and categories are those of the rows
    before these.

    Args:
        cli: The run's config.
        of: What its model folder says of its data.
        series: The series.
        cutoffs: The first row of each that is not known.
        held: How many rows of each are for validation.
        layout: What their file's columns are.
        seed: The seed.

    Raises:
        DataError: There are too few rows.
    """
    start = time.perf_counter()
    train = [(0, cutoff - rows) for cutoff, rows in zip(cutoffs, held, strict=True)]
    validation = [(first - of.seq_len, cutoff) for (_, first), cutoff in zip(train, cutoffs, strict=True)]
    treatment = fit_treatment(series, train, layout, of.treatment.scaling, of.treatment.unseen)
    seed_everything(seed, verbose=False)
    task = type(cli.model)(**_arguments(cli, treatment.covariates.sizes()))
    tester = RollingModel(task.model, replace(of, treatment=treatment, conformal=None), series)
    data = cli.config["data"]
    loaders = (
        WindowLoader(tester.windows(train), data["batch_size"], True, data["drop_last"], seed),
        WindowLoader(tester.windows(validation), data["batch_size"]),
    )
    if not all(map(len, loaders)):
        raise DataError(f"the rows before {series[0].ds[cutoffs[0]].item()} hold too few windows to train")
    epochs, loss = _train(cli, task, *loaders)
    about: dict[str, object] = {
        "first_unknown": str(series[0].ds[cutoffs[0]].item()),
        "train_rows": sum(end for _, end in train),
        "epochs": epochs,
        "best_val_loss": loss,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Refit(tester, validation, about)


def _train(
    cli: CLI, task: LightningModule, train: WindowLoader[Batch], validation: WindowLoader[Batch]
) -> tuple[int, float]:
    """Train a task by a run's config, and load its best weights; return the epochs, and their loss."""
    trainer = build_trainer(**cli.config["trainer"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProgressBar):
            callback.disable()  # the windows have one
    with TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, "best", monitor="val_loss")
        patience = EarlyStopping("val_loss", patience=cli.config["patience"])
        trainer.callbacks += [patience, StopBetweenBatches(), best]  # type: ignore[attr-defined]
        trainer.fit(task, train, validation)
        load_weights(task, Path(best.best_model_path))
    task.eval()
    return trainer.current_epoch, float(best.best_model_score or math.nan)


def _arguments(cli: CLI, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run's task, with what the covariates have become."""
    given = dict(cli.model.hparams)
    if "covariate_sizes" in given:
        given["covariate_sizes"] = sizes
    return given
