"""What a graph model is trained to make small: numbers, one class, or several labels with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError

Kind = Literal["regression", "classification", "multilabel"]
KINDS = ("regression", "classification", "multilabel")


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Args:
        regression: Of numbers: "l1" (the mean absolute error), "mse" (of squares) or "huber".
        class_weights: Of classes: "none"; "balanced", by how rare each is in the training part; "batch", by
            the share of the batch that is of other classes, as published for PATTERN and CLUSTER.
        label_smoothing: How far classes are moved towards the uniform ones.
        positive_weights: Of several labels: "balanced" weighs a label's positives by its negatives.
    """

    regression: Literal["l1", "mse", "huber"] = "l1"
    class_weights: Literal["none", "balanced", "batch"] = "none"
    label_smoothing: float = 0.0
    positive_weights: Literal["none", "balanced"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError("loss.label_smoothing must be from 0 to below 1")


class Criterion(nn.Module):
    """The loss of a batch, and what the model's outputs mean in the data's units.

    Numbers are trained standardised, by the training part's means and deviations. Targets that are unknown
    (NaN) add nothing.

    Args:
        kind: What the targets are.
        options: What is minimised.
        outputs: Numbers that the model gives for each row.
        train: The training part's targets; weights are measured on them. None where nothing is.
        mean: Of numbers: what is taken off; None for nothing.
        std: Of numbers: what they are divided by; None for one.

    Shape:
        train `[rows, targets]`; mean, std `[targets]`.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor | None

    def __init__(
        self,
        kind: Kind,
        options: Loss,
        outputs: int,
        train: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.options, self.outputs = kind, options, outputs
        self.register_buffer("mean", torch.tensor(list(mean or [0.0] * outputs)), persistent=False)
        self.register_buffer("std", torch.tensor(list(std or [1.0] * outputs)), persistent=False)
        weights = None if train is None else self._measure(train)
        self.register_buffer("weights", weights, persistent=False)

    def _measure(self, train: Tensor) -> Tensor | None:
        if self.kind == "classification" and self.options.class_weights == "balanced":
            known = train[~train.isnan()].long()
            counts = known.bincount(minlength=self.outputs).clamp(min=1)
            return known.numel() / (self.outputs * counts).float()
        if self.kind == "multilabel" and self.options.positive_weights == "balanced":
            positive, known = (train == 1).sum(0), (~train.isnan()).sum(0)
            return (known - positive).clamp(min=1) / positive.clamp(min=1)
        return None

    def forward(self, outputs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean over the known targets, zero where there are none.

        Shape:
            outputs `[R, outputs]`; target `[R, targets]`, for classes one column of whole numbers; weight
            `[R]`, what each row counts.
        """
        known = ~target.isnan()
        if self.kind == "classification":
            each, counts = self._classes(outputs, target[:, 0], known[:, 0])
        else:
            each, counts = self._columns(outputs, target.where(known, 0.0)), known.to(outputs.dtype)
        if weight is not None:
            counts = counts * weight.reshape(-1, *(1,) * (counts.dim() - 1))
        total = counts.sum()
        return (each * counts).sum() / total.where(total > 0, 1.0)

    def _columns(self, outputs: Tensor, target: Tensor) -> Tensor:
        if self.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(
                outputs, target, pos_weight=self.weights, reduction="none"
            )
        loss = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.smooth_l1_loss}[self.options.regression]
        return loss(outputs, (target - self.mean) / self.std, reduction="none")

    def _classes(self, outputs: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's loss, and what it counts."""
        target = target.where(known, 0.0).long()
        each = F.cross_entropy(
            outputs, target, reduction="none", label_smoothing=self.options.label_smoothing
        )
        weights = self.weights
        if self.options.class_weights == "batch":
            counts = target[known].bincount(minlength=self.outputs)
            weights = (counts.sum() - counts) / counts.sum().clamp(min=1)
        return each, known.to(outputs.dtype) if weights is None else weights[target] * known

    def values(self, outputs: Tensor) -> Tensor:
        """Return numbers in the data's units, or the probabilities of classes or labels."""
        if self.kind == "regression":
            return outputs * self.std + self.mean
        return outputs.softmax(-1) if self.kind == "classification" else outputs.sigmoid()
