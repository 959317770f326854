"""Figures of a classifier over a whole part, and what a test leaves beside them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multiclass_confusion_matrix,
)

REPORT, CONFUSION = "report.csv", "confusion.csv"
Figures: TypeAlias = dict[str, float]


def by_class(logits: Tensor, target: Tensor) -> dict[str, list[float]]:
    """Return figures of each class against the others: precision, recall, f1, roc_auc, support.

    Several labels a row: the answer is yes above a probability of 0.5. The ROC AUC of a class that has not
    got both answers is NaN.

    Shape:
        logits `[N, K]`; target `[N]` int64, or `[N, K]` of 0 and 1.
    """
    classes = logits.shape[1]
    if target.ndim == 1:
        truth, given = one_hot(target, classes), one_hot(logits.argmax(1), classes)
        p = logits.double().softmax(1)
    else:
        truth, given, p = target.long(), (logits > 0).long(), logits.double().sigmoid()
    found: dict[str, list[float]] = {"precision": [], "recall": [], "f1": [], "roc_auc": [], "support": []}
    for own, answer, chance in zip(truth.T, given.T, p.T, strict=True):
        found["precision"].append(float(binary_precision(answer, own)))
        found["recall"].append(float(binary_recall(answer, own)))
        found["f1"].append(float(binary_f1_score(answer, own)))
        both = 0 < int(own.sum()) < len(own)
        found["roc_auc"].append(float(binary_auroc(chance, own)) if both else math.nan)
        found["support"].append(float(own.sum()))
    return found


def figures(logits: Tensor, target: Tensor) -> Figures:
    """Return accuracy, macro_f1 and roc_auc; the last two are means over classes.

    Shape:
        As `by_class`.
    """
    right = logits.argmax(1) == target if target.ndim == 1 else (logits > 0) == (target > 0.5)
    each = by_class(logits, target)
    areas = [area for area in each["roc_auc"] if not math.isnan(area)]
    return {
        "accuracy": float(right.double().mean()),
        "macro_f1": sum(each["f1"]) / len(each["f1"]),
        "roc_auc": sum(areas) / len(areas) if areas else math.nan,
    }


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Return 1 in the column of each class, `[N, classes]`."""
    return torch.nn.functional.one_hot(target, classes)


@dataclass(frozen=True)
class Verdicts:
    """A tested part.

    Args:
        logits: Of its rows.
        target: Their classes, or 0 and 1 of each label.
        labels: Names of the classes.
        figures: The model's.
        beside: Those of the answer that is most frequent in training.

    Shape:
        logits `[N, K]`; target `[N]` int64 or `[N, K]`.
    """

    logits: Tensor
    target: Tensor
    labels: tuple[str, ...]
    figures: Mapping[str, float]
    beside: Mapping[str, float]

    def write(self, folder: Path) -> list[str]:
        """Write a row a class, and of one class a row the confusions.

        Returns:
            Lines to print.
        """
        each = by_class(self.logits, self.target)
        with (folder / REPORT).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", *each])
            for label, *values in zip(self.labels, *each.values(), strict=True):
                rows.writerow([label, *(f"{value:.6g}" for value in values)])
        written = [REPORT]
        if self.target.ndim == 1:
            counts = multiclass_confusion_matrix(self.logits.argmax(1), self.target, len(self.labels))
            with (folder / CONFUSION).open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["true", *self.labels])
                rows.writerows([label, *row] for label, row in zip(self.labels, counts.tolist(), strict=True))
            written.append(CONFUSION)
        lines = [f"{'':10}     model    majority   ({len(self.target):,} rows, {len(self.labels)} classes)"]
        lines += [f"{key:10} {self.figures[key]:9.4f} {value:11.4f}" for key, value in self.beside.items()]
        return [*lines, f"in {folder}: {', '.join(written)}"]
