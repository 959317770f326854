"""Training and testing a forecasting model. The protocol is that of arXiv 2310.06625 and its predecessors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import Forecast, check_levels, forecast, training_loss
from manyheads.timeseries.conformal import SplitConformal, spacing
from manyheads.timeseries.metrics import ErrorSums
from manyheads.timeseries.quantile_sums import QuantileSums

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.timeseries.data import ForecastData
    from manyheads.timeseries.windows import Batch

Output = Literal["point", "quantile", "student_t", "normal", "negative_binomial"]
WindowScaling = Literal["standard", "mean", "none"]
Plain = bool | int | float | str | None

TESTED = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # levels at which a test measures a distribution


class Forecaster(LightningModule):
    """Train a catalogue model on windows, and measure it in scaled units over all of them.

    Logs `train_loss` and `val_loss` (the model's own loss: the squared error of point forecasts), and in a
    test `test_mse`, `test_mae` of the point forecast (a distribution's mean, the median beside quantiles) and
    `test_windows`, the number of windows they are means over; where there are quantiles also `test_pinball`,
    and of each central interval `test_coverage_0.9`, `test_width_0.9`. Missing targets (NaN) count nowhere.

    Args:
        name: The model's catalogue name.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        output: What is forecast: a point (the mean), quantiles, or a distribution.
        quantiles: Levels of output quantile, rising: [0.1, 0.5, 0.9].
        window_scaling: How each window is scaled, by its observed values; None leaves that to the model, and
            takes "standard" with covariates or an output ("mean" for negative_binomial).
        conformal: Coverages of intervals around a point forecast, rising: [0.9]; they are made of the errors
            in the validation windows after a fit.
        covariate_sizes: How many covariates there are, as the data say.
        learning_rate: Adam's learning rate in the first two epochs.
        lr_decay: What it is multiplied by at the start of each epoch from the third on.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.seq_len", "model.seq_len", "parse"),
        ("data.pred_len", "model.pred_len", "parse"),
        ("data.covariate_sizes", "model.covariate_sizes", "instantiate"),
    )

    def __init__(
        self,
        name: str = "itransformer",
        arguments: dict[str, bool | int | float | str | None] | None = None,
        seq_len: int = 96,
        pred_len: int = 96,
        output: Output = "point",
        quantiles: list[float] | None = None,
        window_scaling: WindowScaling | None = None,
        conformal: list[float] | None = None,
        covariate_sizes: dict[str, int | list[int]] | None = None,
        learning_rate: float = 1e-4,
        lr_decay: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        given = {**(arguments or {}), "seq_len": seq_len, "pred_len": pred_len}
        extras = {"output": output, "quantiles": quantiles, "window_scaling": window_scaling}
        self.name, self.builder_arguments = _recipe(name, given, covariate_sizes or {}, extras)
        self.model = create_model(self.name, **self.builder_arguments)
        self.coverages = tuple(conformal or ())
        check_levels(self.coverages, "conformal")
        self._levels = _tested_levels(self.model)
        if self.coverages and self._levels:
            raise UsageError("conformal intervals are for output point; this model has quantiles of its own")
        self.learning_rate, self.lr_decay = learning_rate, lr_decay
        self._intervals: SplitConformal | None = None
        self._begin()

    def _begin(self) -> None:
        """Begin the sums."""
        self._loss = torch.zeros(2, dtype=torch.float64)  # of all targets, and how many these are
        self._errors = ErrorSums()
        levels = self._intervals.levels if self._intervals else self._levels
        self._quantiles = QuantileSums(levels) if levels else None

    def forward(self, batch: Batch) -> Tensor:
        """Forecast a batch, in scaled units.

        Shape:
            `[B, P, N]`.
        """
        return forecast(self.model, batch).point

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        loss = training_loss(self.model, batch)
        size = len(batch["y"])
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin the sums."""
        self._begin()

    def validation_step(self, batch: Batch) -> None:
        """Add a batch's loss."""
        loss, count = training_loss(self.model, batch).detach(), (~batch["y"].isnan()).sum()
        if loss.device.type == "mps":  # has no float64
            loss, count = loss.cpu(), count.cpu()
        added = torch.stack([loss.double() * count, count.double()])
        self._loss = self._loss.to(added.device) + added

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all windows."""
        total, count = self._reduced(self._loss)
        self.log("val_loss", total / count, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Make the conformal intervals, if any are wanted, and begin the sums."""
        self._intervals = self._calibrated() if self.coverages else None
        self._begin()

    def test_step(self, batch: Batch) -> None:
        """Add a batch's errors."""
        point, quantiles = self._forecast(batch)
        self._errors.add(point, batch["y"])
        if self._quantiles is not None:
            assert quantiles is not None
            self._quantiles.add(quantiles, batch["y"])

    def on_test_epoch_end(self) -> None:
        """Log the means over all windows, and how many these are."""
        self._errors.totals = self._reduced(self._errors.totals)
        found = {"mse": self._errors.mse, "mae": self._errors.mae, "windows": self._errors.windows}
        if self._quantiles is not None:
            self._quantiles.totals = self._reduced(self._quantiles.totals)
            found |= self._quantiles.figures()
        self.log_dict({f"test_{key}": value for key, value in found.items()})

    def predict_step(self, batch: Batch) -> Tensor:
        """Return a batch's point forecasts, in scaled units."""
        return self(batch)

    def calibration(self) -> dict[str, object]:
        """Return the conformal intervals for the model folder, if any are wanted."""
        return {"conformal": self._calibrated().to_json()} if self.coverages else {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the learning rate is held for two epochs, then decays every epoch.

        The official code calls this "type1": it sets the decayed rate after each epoch, but by the number of
        the epoch that ended, so the second one runs at the full rate.

        Raises:
            UsageError: The model has no parameters.
        """
        if not any(p.requires_grad for p in self.parameters()):
            raise UsageError(f"{self.name} has no parameters to train; only test it")
        adam = torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
        decay = self.lr_decay
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: decay ** max(0, epoch - 1))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def _forecast(self, batch: Batch) -> Forecast:
        """Forecast a batch with the quantiles that a test measures."""
        if self._intervals is None:
            return forecast(self.model, batch, self._levels)
        point = forecast(self.model, batch).point
        found = self._intervals
        return Forecast(point, found.apply(point, found.levels, found.columns))

    def _calibrated(self) -> SplitConformal:
        """Make conformal intervals of the validation windows' errors."""
        data: ForecastData = self.trainer.datamodule  # type: ignore[attr-defined]
        every, seen, errors = spacing(len(data.val_windows), data.pred_len * len(data.columns)), 0, []
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in data.val_dataloader(alone=True):
                moved = self.transfer_batch_to_device(batch, self.device, 0)
                chosen = slice(-seen % every, None, every)
                errors.append((moved["y"] - forecast(self.model, moved).point)[chosen].abs().cpu())
                seen += len(batch["y"])
        self.model.train(training)
        return SplitConformal.fit(torch.cat(errors).double().numpy(), self.coverages, data.columns)

    def _reduced(self, sums: Tensor) -> Tensor:
        """Add up the sums of all processes."""
        totals = self.trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(totals, Tensor)
        return totals


def _recipe(
    name: str,
    arguments: Mapping[str, Plain],
    covariate_sizes: Mapping[str, int | list[int]],
    extras: Mapping[str, str | list[float] | None],
) -> tuple[str, dict[str, Json]]:
    """Return the name and arguments of what is to be built: the model itself, or a forecaster around it."""
    sizes = {key: value for key, value in covariate_sizes.items() if value}
    wanted = {key: value for key, value in extras.items() if value not in (None, "point")}
    added = cast("dict[str, Json]", {**sizes, **wanted})
    if not added:
        return name, dict(arguments)
    if "output" in inspect.signature(builder(find(name))).parameters:  # it has outputs of its own
        return name, {**arguments, **added}
    own: dict[str, Json] = {k: v for k, v in arguments.items() if k not in ("seq_len", "pred_len")}
    lengths = {key: arguments[key] for key in ("seq_len", "pred_len")}
    return "forecaster", {"base": name, **lengths, "arguments": own, **added}


def _tested_levels(model: torch.nn.Module) -> tuple[float, ...]:
    """Return the levels at which a test measures a model's quantiles; none of a point model."""
    levels = getattr(model, "levels", ())
    return TESTED if levels is None else levels
