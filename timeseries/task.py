"""Training and testing a forecasting model. The protocol is that of arXiv 2310.06625 and its predecessors."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.timeseries.metrics import ErrorSums, masked_mse

if TYPE_CHECKING:
    from manyheads.timeseries.windows import Batch


class Forecaster(LightningModule):
    """Train a catalogue model on windows, and measure it in scaled units over all of them.

    Logs `train_loss`, `val_loss` (mean squared errors), and in a test `test_mse`, `test_mae` and
    `test_windows`, the number of windows the two are means over. Missing targets (NaN) count nowhere.

    Args:
        name: The model's catalogue name.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        learning_rate: Adam's learning rate in the first two epochs.
        lr_decay: What it is multiplied by at the start of each epoch from the third on.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.seq_len", "model.seq_len", "parse"),
        ("data.pred_len", "model.pred_len", "parse"),
    )

    def __init__(
        self,
        name: str = "itransformer",
        arguments: dict[str, bool | int | float | str | None] | None = None,
        seq_len: int = 96,
        pred_len: int = 96,
        learning_rate: float = 1e-4,
        lr_decay: float = 0.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = name
        self.builder_arguments = {**(arguments or {}), "seq_len": seq_len, "pred_len": pred_len}
        self.learning_rate, self.lr_decay = learning_rate, lr_decay
        self.model = create_model(name, **self.builder_arguments)
        self._errors = ErrorSums()

    def forward(self, batch: Batch) -> Tensor:
        """Forecast a batch, in scaled units.

        Shape:
            `[B, P, N]`.
        """
        return self.model(batch["x"], batch["x_mark"], batch["y_mark"])

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        loss = masked_mse(self(batch), batch["y"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["y"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin the sums."""
        self._errors = ErrorSums()

    def validation_step(self, batch: Batch) -> None:
        """Add a batch's errors."""
        self._errors.add(self(batch), batch["y"])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all windows."""
        self._reduce()
        self.log("val_loss", self._errors.mse, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Begin the sums."""
        self._errors = ErrorSums()

    def test_step(self, batch: Batch) -> None:
        """Add a batch's errors."""
        self._errors.add(self(batch), batch["y"])

    def on_test_epoch_end(self) -> None:
        """Log the means over all windows, and how many these are."""
        self._reduce()
        errors = self._errors
        self.log_dict({"test_mse": errors.mse, "test_mae": errors.mae, "test_windows": errors.windows})

    def predict_step(self, batch: Batch) -> Tensor:
        """Return a batch's forecasts, in scaled units."""
        return self(batch)

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

    def _reduce(self) -> None:
        """Add up the sums of all processes."""
        totals = self.trainer.strategy.reduce(self._errors.totals, reduce_op="sum")
        assert isinstance(totals, Tensor)
        self._errors.totals = totals
