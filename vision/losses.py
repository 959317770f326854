"""Losses of image classifiers, on soft targets throughout: mixed, smoothed, weighted, partly unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError

Weights = Literal["none", "balanced"] | list[float]


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Args:
        kind: `auto` is cross_entropy for one label an image and bce for several; bce and focal serve both.
        class_weights: Weights of the classes, for one label an image; balanced makes them of the counts.
        pos_weight: Weights of the positives, for several labels; balanced is negatives by positives.
        focal_gamma: Focal loss: how strongly what is easy counts less.
    """

    kind: Literal["auto", "cross_entropy", "bce", "focal"] = "auto"
    class_weights: Weights = "none"
    pos_weight: Weights = "none"
    focal_gamma: float = 2.0


class Criterion(nn.Module):
    """The mean loss of a batch over what is known of it.

    One label an image: mean over images, by the weights of their classes. Several labels: mean over the known
    pairs of image and label; NaN is unknown.

    Args:
        loss: What is minimised.
        classes: How many classes or labels there are.
        multi_label: Whether an image can have several labels.
        class_counts: Train images of each class, or with each label; needed for balanced weights.
        known_counts: Several labels: train images of which each label is known; needed for balanced weights.

    Raises:
        UsageError: The options do not go together.

    Shape:
        logits `[B, K]`, target `[B]` int64 or `[B, K]` probabilities -> a scalar.
    """

    def __init__(
        self,
        loss: Loss,
        classes: int,
        multi_label: bool = False,
        class_counts: Sequence[int] | None = None,
        known_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        kind = loss.kind if loss.kind != "auto" else "bce" if multi_label else "cross_entropy"
        if multi_label and kind == "cross_entropy":
            raise UsageError("loss.kind cross_entropy is for one label an image; several take bce or focal")
        if multi_label and loss.class_weights != "none":
            raise UsageError("loss.class_weights are for one label an image; several take loss.pos_weight")
        if not multi_label and loss.pos_weight != "none":
            raise UsageError("loss.pos_weight is for several labels an image; one takes loss.class_weights")
        if loss.focal_gamma < 0:
            raise UsageError(f"loss.focal_gamma must not be negative, but is {loss.focal_gamma:g}")
        self.kind, self.classes, self.multi_label, self.gamma = kind, classes, multi_label, loss.focal_gamma
        key, given = ("pos_weight", loss.pos_weight) if multi_label else ("class_weights", loss.class_weights)
        # No buffer: the config makes it again, and averaged weights have no part in it.
        self.weight = _weights(key, given, classes, class_counts, known_counts if multi_label else None)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss."""
        weight = self.weight.to(logits)
        soft = target.to(logits.dtype) if target.ndim == 2 else F.one_hot(target, self.classes).to(logits)
        if self.multi_label:
            known = ~soft.isnan()
            each = self._binary(logits, soft.nan_to_num(0.0), weight)
            return (each * known).sum() / known.sum().clamp(min=1)
        if self.kind == "bce":
            each = self._binary(logits, soft, torch.ones_like(weight)).mean(dim=-1)
            by = (soft * weight).sum(dim=-1)
            return (each * by).sum() / by.sum()
        log_p = logits.log_softmax(dim=-1)
        focus = (1 - log_p.exp()) ** self.gamma if self.kind == "focal" else 1.0
        return -(weight * soft * focus * log_p).sum() / (weight * soft).sum()

    def _binary(self, logits: Tensor, target: Tensor, pos_weight: Tensor) -> Tensor:
        """Return each binary loss; focal counts it by the probability of the other answer."""
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=pos_weight)
        if self.kind != "focal":
            return each
        p = logits.sigmoid()
        return each * (target * (1 - p) + (1 - target) * p) ** self.gamma


def smoothed(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return targets as probabilities, moved towards the uniform ones; unknown stays unknown.

    Shape:
        `[B]` int64 (one label) or `[B, K]` (several labels) -> `[B, K]`.
    """
    if target.ndim == 2:
        return target * (1 - smoothing) + smoothing / 2
    return F.one_hot(target, classes).float() * (1 - smoothing) + smoothing / classes


def _weights(
    key: str,
    given: Weights,
    classes: int,
    class_counts: Sequence[int] | None,
    known_counts: Sequence[int] | None,
) -> Tensor:
    """Return a weight a class, all 1 where none are wanted."""
    if given == "none":
        return torch.ones(classes)
    if isinstance(given, list):
        if len(given) != classes or not all(0 <= value < float("inf") for value in given) or not any(given):
            raise UsageError(f"loss.{key} takes {classes} weights of 0 or more, one a class, not {given}")
        return torch.tensor(given)
    if class_counts is None or not all(class_counts):
        raise UsageError(f"loss.{key} balanced needs a train image of each class; counts: {class_counts}")
    counts = torch.tensor(class_counts, dtype=torch.float)
    if known_counts is None:
        return counts.sum() / (classes * counts)
    return (torch.tensor(known_counts, dtype=torch.float) - counts).clamp(min=1) / counts
