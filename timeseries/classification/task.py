"""Training and testing a series classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from manyheads.core.catalog import create_model
from manyheads.core.training import of_all

if TYPE_CHECKING:
    from manyheads.timeseries.classification.data import LabelledBatch


class Classifier(LightningModule):
    """Train a classifier on the encoder of a catalogue model.

    Logs `train_loss`, `val_loss` (cross-entropies), `val_accuracy`, and in a test `test_loss`,
    `test_accuracy`, `test_f1` (mean over the classes) and `test_series`, their number.

    Args:
        name: Catalogue name of the model whose encoder is taken.
        arguments: That model's own options (`manyheads models show NAME` lists them).
        seq_len: Steps of the window; the data say it.
        channels: Values a step; the data say it.
        classes: How many classes; the data say it.
        dropout: Probability of dropping an element of what the last linear map sees.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's decay of the weights.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.seq_len", "model.seq_len", "instantiate"),
        ("data.channels", "model.channels", "instantiate"),
        ("data.classes", "model.classes", "instantiate"),
    )

    def __init__(
        self,
        seq_len: int,
        channels: int,
        classes: int,
        name: str = "informer",
        arguments: dict[str, bool | int | float | str | None] | None = None,
        dropout: float = 0.1,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = "classifier"
        self.builder_arguments = {
            "base": name,
            "seq_len": seq_len,
            "channels": channels,
            "classes": classes,
            "arguments": arguments,
            "dropout": dropout,
        }
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.model = create_model(self.name, **self.builder_arguments)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: LabelledBatch) -> Tensor:
        """Return a batch's logits.

        Shape:
            `[B, classes]`.
        """
        return self.model(batch["x"], batch["observed"])

    def training_step(self, batch: LabelledBatch) -> Tensor:
        """Return the loss of a batch."""
        loss = F.cross_entropy(self(batch), batch["y"])
        size = len(batch["y"])
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size
        )
        return loss

    def validation_step(self, batch: LabelledBatch) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch), batch["y"]))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all series."""
        logits, y = self._gathered()
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", multiclass_accuracy(logits, y, logits.shape[1], average="micro"))

    def test_step(self, batch: LabelledBatch) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch), batch["y"]))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all series, and how many these are."""
        logits, y = self._gathered()
        classes = logits.shape[1]
        figures = {
            "test_loss": F.cross_entropy(logits, y),
            "test_accuracy": multiclass_accuracy(logits, y, classes, average="micro"),
            "test_f1": multiclass_f1_score(logits, y, classes, average="macro"),
            "test_series": torch.tensor(float(len(y))),
        }
        self.log_dict(figures)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Return all logits and classes since the last call, of all processes."""
        seen, self._seen = of_all(self.trainer, self._seen), []
        logits, y = (torch.cat(each).to(self.device) for each in zip(*seen, strict=True))
        return logits, y

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW at a constant rate."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
