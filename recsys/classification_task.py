"""Training and testing a classifier of texts and their customers' variables."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from manyheads.core import optimization
from manyheads.core.catalog import create_model, find
from manyheads.core.errors import DataError, UsageError
from manyheads.core.optimization import Optimizer
from manyheads.core.training import of_all
from manyheads.recsys.classification_report import Figures, Verdicts, figures

if TYPE_CHECKING:
    from manyheads.core.hub import Json
    from manyheads.recsys.classification_data import Labelled, TextData
    from manyheads.recsys.customers import Inputs

Plain = bool | int | float | str | None
TASK = "text_classification"
Weights = Literal["none", "balanced"] | list[float]


class TextClassifier(LightningModule):
    """Train a classifier of texts and variables, and measure it over whole parts.

    Logs `train_loss`, and of validation and test `val_loss`, `val_accuracy`, `val_macro_f1` (the mean over
    classes) and `val_roc_auc` (the mean over classes that have both answers); the test also
    `test_majority_accuracy` and `test_majority_macro_f1`, of the answer that is most frequent in training,
    and `test_rows`. Of several labels a row the accuracy counts each label. The best epoch is that of the
    highest `val_roc_auc`.

    Args:
        inputs: What of the model the data decide; the data say it.
        several: Whether a row can have several labels; the data say it.
        class_counts: Training rows of each class, and of all; the data say it.
        name: Catalogue name of the model.
        arguments: The model's own options (`manyheads models show NAME` lists them).
        optimizer: Adam or AdamW, its rate by step, averaged weights.
        class_weights: How much classes count in the loss, or yes against no of several labels; "balanced": by
            how rare they are.

    Raises:
        UsageError: The options do not go together.
    """

    LINKS: ClassVar[tuple[tuple[str, str, Literal["parse", "instantiate"]], ...]] = (
        ("data.model_inputs", "model.inputs", "instantiate"),
        ("data.several", "model.several", "instantiate"),
        ("data.class_counts", "model.class_counts", "instantiate"),
    )

    def __init__(
        self,
        inputs: dict[str, int | list[int]],
        several: bool,
        class_counts: list[int],
        name: str = "cross_attention_fusion",
        arguments: dict[str, Plain] | None = None,
        optimizer: Optimizer = Optimizer(),  # noqa: B008  # frozen
        class_weights: Weights = "none",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"name": name, "optimizer": asdict(optimizer), "class_weights": class_weights}
        )
        self.name, self.several, self.class_counts, self.optimizer = name, several, class_counts, optimizer
        self.builder_arguments = _recipe(name, arguments or {}, inputs)
        self.model = create_model(name, **self.builder_arguments)
        self.weight = _weights(class_weights, several, class_counts)  # no buffer: the config makes it again
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._tested: Verdicts | None = None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """The figure by which an epoch is the best one."""
        return "val_roc_auc", "max"

    def forward(self, inputs: Inputs) -> Tensor:
        """Return a batch's logits, `[B, classes]`."""
        return cast(Tensor, self.model(inputs.texts, inputs.numbers, inputs.kinds))

    def training_step(self, batch: Labelled) -> Tensor:
        """Return the loss of a batch."""
        loss = self._loss(self(batch.inputs), batch.target)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch.target))
        return loss

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(logits)
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
        return F.cross_entropy(logits, target, weight)

    def validation_step(self, batch: Labelled) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch.inputs).float(), batch.target))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all rows.

        Raises:
            DataError: The best epoch cannot be told: all rows have one answer.
        """
        logits, target = self._gathered()
        found = self._figures(logits, target)
        if math.isnan(found["roc_auc"]):
            raise DataError("val_roc_auc cannot be had: all validation rows are of one class")
        self.log_dict({f"val_{key}": value for key, value in found.items()})

    def test_step(self, batch: Labelled) -> None:
        """Keep a batch's logits."""
        self._seen.append((self(batch.inputs).float(), batch.target))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all rows, and those of the most frequent answer."""
        logits, target = self._gathered()
        found = self._figures(logits, target)
        beside = figures(self._majority(len(target)), target)
        self._tested = Verdicts(logits.cpu(), target.cpu(), tuple(self._data.labels), found, beside)
        self.log_dict({f"test_{key}": value for key, value in found.items()})
        self.log_dict({f"test_majority_{key}": beside[key] for key in ("accuracy", "macro_f1")})
        self.log("test_rows", float(len(target)))

    def report(self, folder: Path) -> list[str]:
        """Write the last test's figures by class and confusions into a folder.

        Returns:
            Lines to print.
        """
        assert self._tested is not None
        return self._tested.write(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and a schedule by step.

        Raises:
            UsageError: The run has no end that the schedule needs.
        """
        batches = len(self._data.train_dataloader())
        return optimization.configure(self.model, self.optimizer, optimization.NEVER, self.trainer, batches)

    def configure_callbacks(self) -> list[Callback]:
        """Average the weights, if that is wanted."""
        return optimization.make_callbacks(self.optimizer, optimization.NEVER, self.trainer, self.monitor)

    def _figures(self, logits: Tensor, target: Tensor) -> Figures:
        return {"loss": float(self._loss(logits, target)), **figures(logits, target)}

    def _majority(self, rows: int) -> Tensor:
        """Return logits of the answer that is most frequent in training."""
        *counts, total = self.class_counts
        each = torch.tensor(counts, dtype=torch.float32)
        best = 2 * each - total if self.several else each - each.max() + 0.5
        return best.to(self.device).expand(rows, -1)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Return all logits and targets since the last call, of all processes."""
        seen, self._seen = of_all(self.trainer, self._seen), []
        logits, target = (torch.cat(each).to(self.device) for each in zip(*seen, strict=True))
        return logits, target

    @property
    def _data(self) -> TextData:
        return cast("TextData", self.trainer.datamodule)  # type: ignore[attr-defined]


def _recipe(name: str, arguments: dict[str, Plain], inputs: dict[str, int | list[int]]) -> dict[str, Json]:
    """Return everything that the catalogue's builder gets.

    Raises:
        UsageError: `arguments` decide what is decided elsewhere, or the model is of another task.
    """
    entry = find(name)
    if entry.task != TASK:
        raise UsageError(f"{name} is for {entry.task}, not for {TASK}")
    for key in inputs:
        if key in arguments:
            raise UsageError(f"model.arguments.{key} is decided by the data")
    return dict(cast("dict[str, Json]", inputs)) | dict(arguments)


def _weights(given: Weights, several: bool, class_counts: list[int]) -> Tensor | None:
    """Return a weight a class, or None."""
    if given == "none":
        return None
    *counts, total = class_counts
    if given == "balanced":
        each = torch.tensor(counts, dtype=torch.float32)
        return (total - each).clamp(min=1) / each if several else total / (len(each) * each)
    if len(given) != len(counts) or not all(0 <= value < float("inf") for value in given) or not any(given):
        raise UsageError(f"class_weights takes {len(counts)} weights of 0 or more, one a class, not {given}")
    return torch.tensor(given)
