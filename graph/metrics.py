"""How good predictions are, over all rows of a part at once; what is unknown does not count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_confusion_matrix,
)

from manyheads.graph.losses import Kind

Figures = dict[str, float]


def of_regression(predicted: Tensor, target: Tensor) -> list[Figures]:
    """Return mae, rmse and r2 of each column, and on how many rows; NaN where there are none.

    Shape:
        predicted, target `[R, targets]`, in the data's units; NaN is unknown.
    """
    found = []
    for mine, true in _known(predicted, target):
        rows = len(true)
        found.append(
            {
                "mae": float(mean_absolute_error(mine, true)) if rows else math.nan,
                "rmse": float(mean_squared_error(mine, true, squared=False)) if rows else math.nan,
                "r2": float(r2_score(mine, true)) if rows > 1 and true.std() > 0 else math.nan,
                "rows": float(rows),
            }
        )
    return found


def of_multilabel(scores: Tensor, target: Tensor) -> list[Figures]:
    """Return roc_auc and average precision of each column, and how many rows and positives it has.

    A label whose known rows are all of one class has neither: NaN, and the mean leaves it out, as OGB's does.

    Shape:
        scores `[R, labels]`, logits or chances; target the same: 0, 1, or NaN for unknown.
    """
    found = []
    for mine, true in _known(scores, target):
        order = mine.unique(return_inverse=True)[1]  # ranks: no two become one, as in a sigmoid
        ranks, truth = order.double() / max(1, len(order)), true.long()
        positive = int(truth.sum())
        both = 0 < positive < len(truth)
        found.append(
            {
                "roc_auc": float(binary_auroc(ranks, truth)) if both else math.nan,
                "average_precision": float(binary_average_precision(ranks, truth)) if both else math.nan,
                "positives": float(positive),
                "rows": float(len(truth)),
            }
        )
    return found


def _known(predicted: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each column's predicted and true numbers, those that are known."""
    for mine, true in zip(predicted.double().T, target.double().T, strict=True):
        known = ~true.isnan()
        yield mine[known].contiguous(), true[known].contiguous()


def confusion(scores: Tensor, target: Tensor) -> Tensor:
    """Count classes as they are (rows) and as they are predicted (columns).

    Shape:
        scores `[R, classes]`; target `[R]`, NaN for unknown; the result `[classes, classes]`.
    """
    known = ~target.isnan()
    guessed, true = scores[known].argmax(-1), target[known].long()
    if not len(true):
        return torch.zeros(scores.shape[1], scores.shape[1], dtype=torch.int64)
    found: Tensor = multiclass_confusion_matrix(guessed, true, num_classes=scores.shape[1])
    return found


def of_classes(counts: Tensor) -> list[Figures]:
    """Return recall, precision and f1 of each class, and its rows, from a confusion matrix."""
    right = counts.diagonal().double()
    true, guessed = counts.sum(1), counts.sum(0)
    recall, precision = right / true, right / guessed
    f1 = 2 * right / (true + guessed)
    return [
        {"recall": float(r), "precision": float(p), "f1": float(f), "rows": float(n)}
        for r, p, f, n in zip(recall, precision, f1, true, strict=True)
    ]


def mean(each: Sequence[Figures], name: str) -> float:
    """Return the mean of a figure over the columns that have it; NaN if none has."""
    known = [figures[name] for figures in each if not math.isnan(figures[name])]
    return sum(known) / len(known) if known else math.nan


def figures(kind: Kind, values: Tensor, target: Tensor) -> Figures:
    """Return the figures of a part: of several columns, their means.

    Regression: mae, rmse, r2. Classes: accuracy, balanced_accuracy (the mean recall of the classes that
    occur), f1 (the mean of those). Labels: roc_auc, average_precision.

    Args:
        kind: What the targets are.
        values: What is predicted: numbers in the data's units, else scores.
        target: What is true; NaN is unknown.

    Shape:
        values `[R, outputs]`; target `[R, targets]`.
    """
    if kind == "regression":
        numbers = of_regression(values, target)
        return {name: mean(numbers, name) for name in ("mae", "rmse", "r2")}
    if kind == "multilabel":
        labels = of_multilabel(values, target)
        return {name: mean(labels, name) for name in ("roc_auc", "average_precision")}
    counts = confusion(values, target[:, 0])
    classes = [each for each in of_classes(counts) if each["rows"]]
    total = int(counts.sum())
    return {
        "accuracy": float(counts.diagonal().sum()) / total if total else math.nan,
        "balanced_accuracy": mean(classes, "recall"),
        "f1": mean(classes, "f1"),
    }
