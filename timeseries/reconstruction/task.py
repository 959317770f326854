"""Training and testing a reconstructor: to fill in missing values, or to find the rows that do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.core.training import of_all
from manyheads.timeseries.metrics import ErrorSums, masked_mse
from manyheads.timeseries.reconstruction.masks import draw_gaps, last_value, linear
from manyheads.timeseries.reconstruction.scores import figures, fit_thresholds, rebuild, row_scores

if TYPE_CHECKING:
    from manyheads.timeseries.reconstruction.data import DetectionData
    from manyheads.timeseries.reconstruction.masks import MaskedBatch
    from manyheads.timeseries.reconstruction.parts import ScoredBatch
    from manyheads.timeseries.windows import Batch

Link = tuple[str, str, Literal["parse", "instantiate"]]
_LINKS: tuple[Link, ...] = (
    ("data.seq_len", "model.seq_len", "parse"),
    ("data.channels", "model.channels", "instantiate"),
)


def _decaying_adam(module: nn.Module, learning_rate: float, decay: float) -> OptimizerLRScheduler:
    """Adam whose rate is held for two epochs, then decays every epoch, as in the forecasters' training."""
    adam = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: decay ** max(0, epoch - 1))
    return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


class Imputer(LightningModule):
    """Train a model to rebuild hidden cells of windows, and measure it on hidden cells in scaled units.

    Logs `train_loss`, `val_loss` (mean squared errors over hidden cells), and in a test `test_mse`,
    `test_mae`, the same of linear interpolation (`test_mse_linear`, ...) and of the last value
    (`test_mse_last`, ...) on the same cells, and `test_windows`, the number of windows.

    Args:
        channels: Values a step; the data say it.
        name: Catalogue name of the model that rebuilds.
        arguments: That model's own options (`manyheads models show NAME` lists them).
        seq_len: Steps of a window; the data say it.
        fill: What the gaps hold that the model sees: the "line" between the values around them, to which it
            then adds; or "zeros", as in the paper, which came out worse on ETTh1 (with another
            schedule).
        learning_rate: Adam's learning rate in the first two epochs.
        lr_decay: What it is multiplied by at the start of each epoch from the third on.
    """

    LINKS: ClassVar[tuple[Link, ...]] = _LINKS

    def __init__(
        self,
        channels: int,
        name: str = "itransformer",
        arguments: dict[str, bool | int | float | str | None] | None = None,
        seq_len: int = 96,
        fill: Literal["line", "zeros"] = "line",
        learning_rate: float = 1e-3,
        lr_decay: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = "imputer"
        self.builder_arguments = {
            "base": name,
            "seq_len": seq_len,
            "channels": channels,
            "arguments": arguments or {},
            "fill": fill,
        }
        self.learning_rate, self.lr_decay = learning_rate, lr_decay
        self.model = create_model(self.name, **self.builder_arguments)
        self._sums: dict[str, ErrorSums] = {}

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Rebuild a batch without its hidden cells, in scaled units.

        Shape:
            `[B, L, N]`.
        """
        return self.model(batch["x"], batch["observed"] & ~batch["hidden"], batch["x_mark"])

    def training_step(self, batch: MaskedBatch) -> Tensor:
        """Return the loss of a batch: over its hidden cells alone."""
        loss = masked_mse(self(batch), _truth(batch))
        size = len(batch["x"])
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin the sums."""
        self._sums = {"": ErrorSums()}

    def validation_step(self, batch: MaskedBatch) -> None:
        """Add a batch's errors."""
        self._sums[""].add(self(batch), _truth(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all hidden cells."""
        self._reduce()
        self.log("val_loss", self._sums[""].mse, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Begin the sums."""
        self._sums = {"": ErrorSums(), "_linear": ErrorSums(), "_last": ErrorSums()}

    def test_step(self, batch: MaskedBatch) -> None:
        """Add the errors of a batch, and of the plain ways to fill it."""
        truth, known = _truth(batch), batch["observed"] & ~batch["hidden"]
        self._sums[""].add(self(batch), truth)
        self._sums["_linear"].add(linear(batch["x"], known), truth)
        self._sums["_last"].add(last_value(batch["x"], known), truth)

    def on_test_epoch_end(self) -> None:
        """Log the means over all hidden cells, and how many windows they are of."""
        self._reduce()
        for name, sums in self._sums.items():
            self.log_dict({f"test_mse{name}": sums.mse, f"test_mae{name}": sums.mae})
        self.log("test_windows", self._sums[""].windows)

    def _reduce(self) -> None:
        """Add up the sums of all processes."""
        for sums in self._sums.values():
            sums.totals = cast(Tensor, self.trainer.strategy.reduce(sums.totals, reduce_op="sum"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with a decaying rate."""
        return _decaying_adam(self, self.learning_rate, self.lr_decay)


def _truth(batch: MaskedBatch) -> Tensor:
    """Return the values of the hidden cells, NaN elsewhere."""
    return batch["x"].where(batch["hidden"], float("nan"))


class Detector(LightningModule):
    """Train a model to rebuild windows, without labels; rows that it rebuilds badly are anomalies.

    A model that sees a cell may copy it, were it an anomaly. With several passes each cell is hidden in one
    of them, with `gap` - 1 beside it, and is rebuilt from the others; training then hides cells at random.

    Logs `train_loss`, `val_loss` (mean squared errors), and in a test `test_loss`, `test_flagged` (share of
    the rows above the threshold) and `test_rows`; with labels also `test_precision`, `test_recall`, `test_f1`
    of single rows (not point-adjusted) and `test_auroc`.

    Args:
        channels: Values a step; the data say it.
        name: Catalogue name of the model that rebuilds.
        arguments: That model's own options (`manyheads models show NAME` lists them).
        seq_len: Steps of a window; the data say it.
        quantile: Share of the validation rows whose scores lie below the threshold.
        passes: In how many passes a window's cells are hidden in turn; 1 hides none.
        gap: Steps of a run of hidden cells of one column.
        learning_rate: Adam's learning rate in the first two epochs.
        lr_decay: What it is multiplied by at the start of each epoch from the third on.
    """

    LINKS: ClassVar[tuple[Link, ...]] = _LINKS

    def __init__(
        self,
        channels: int,
        name: str = "itransformer",
        arguments: dict[str, bool | int | float | str | None] | None = None,
        seq_len: int = 96,
        quantile: float = 0.99,
        passes: int = 1,
        gap: int = 1,
        learning_rate: float = 1e-3,
        lr_decay: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < quantile < 1:
            raise UsageError(f"quantile must lie between 0 and 1, not {quantile}")
        if passes < 1 or not 1 <= gap < seq_len:
            raise UsageError(
                f"passes {passes} and gap {gap} must be 1 or more, gap less than {seq_len} steps"
            )
        self.save_hyperparameters()
        self.name = "detector"
        self.builder_arguments = {
            "base": name,
            "seq_len": seq_len,
            "channels": channels,
            "arguments": arguments or {},
        }
        self.quantile, self.passes, self.gap = quantile, passes, gap
        self.learning_rate, self.lr_decay = learning_rate, lr_decay
        self.model = create_model(self.name, **self.builder_arguments)
        self.thresholds: Tensor
        # A checkpoint keeps the thresholds of its own weights.
        self.register_buffer("thresholds", torch.full((1 + channels,), float("nan"), dtype=torch.float64))
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def forward(self, batch: Batch) -> Tensor:
        """Rebuild a batch, in scaled units.

        Shape:
            `[B, L, N]`.
        """
        return rebuild(self.model, batch["x"], batch["observed"], batch["x_mark"], self.passes, self.gap)

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch: over what is observed, or where cells are hidden, over these."""
        x, asked, given = batch["x"], batch["observed"], batch["observed"]
        if self.passes > 1:
            noise = torch.rand(len(x), x.shape[1] + self.gap - 1, x.shape[2], device=x.device)
            hidden = draw_gaps(noise, 1 / self.passes, self.gap)
            asked, given = asked & hidden, given & ~hidden
        loss = masked_mse(self.model(x, given, batch["x_mark"]), x.where(asked, float("nan")))
        size = len(x)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def _score(self, batch: ScoredBatch) -> None:
        """Keep the scores and labels of the rows that no batch before had."""
        scores = row_scores(self(batch), batch["x"], batch["observed"])
        self._scores.append(scores[batch["fresh"]])
        self._labels.append(batch["label"][batch["fresh"]])

    def validation_step(self, batch: ScoredBatch) -> None:
        """Score a batch's rows."""
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean error, and take the thresholds from the rows."""
        scores, _ = self._taken()
        self.thresholds = fit_thresholds(scores, self.quantile, self._columns()).to(scores.device)
        self.log("val_loss", scores[:, 1:].nanmean().float(), prog_bar=True)

    def test_step(self, batch: ScoredBatch) -> None:
        """Score a batch's rows."""
        self._score(batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures of all rows, and how many these are."""
        scores, labels = self._taken()
        threshold, rows = self.thresholds[0], scores[:, 0]
        self.log("test_loss", scores[:, 1:].nanmean().float())
        self.log("test_flagged", (rows > threshold).float().mean())
        if not labels.isnan().all():
            self.log_dict({f"test_{name}": value for name, value in figures(rows, labels, threshold).items()})
        self.log("test_rows", float(len(rows)))

    def calibration(self) -> dict[str, object]:
        """Return how rows are scored, and the thresholds, of rows first and then of each column."""
        return {"thresholds": self.thresholds.tolist(), "passes": self.passes, "gap": self.gap}

    def _taken(self) -> tuple[Tensor, Tensor]:
        """Return all scores and labels since the last call, of all processes."""
        seen = of_all(self.trainer, list(zip(self._scores, self._labels, strict=True)))
        self._scores.clear()
        self._labels.clear()
        scores, labels = (torch.cat(each).to(self.device) for each in zip(*seen, strict=True))
        return scores, labels

    def _columns(self) -> tuple[str, ...]:
        data: DetectionData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.parts.columns

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with a decaying rate."""
        return _decaying_adam(self, self.learning_rate, self.lr_decay)
