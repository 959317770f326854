"""Figures of image classifiers over a whole split, and the report by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multilabel_auroc,
    multilabel_average_precision,
)

BINS = 15
ALL_SHOWN, ENDS_SHOWN = 20, 5  # up to so many classes a report prints whole, else so many of each end
UNKNOWN = -1


def top_k(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Return the share of images whose class is among the k most probable."""
    return (logits.topk(k, dim=-1).indices == target[:, None]).any(dim=-1).float().mean()


def probabilities(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return probabilities: softmax where there is one label an image, sigmoid where there are several."""
    scaled = logits.float() / temperature
    return scaled.softmax(dim=-1) if target.ndim == 1 else scaled.sigmoid()


def calibration_error(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the expected calibration error in 15 bins, of the most probable class or of all known labels."""
    p = probabilities(logits, target, temperature)
    if target.ndim == 1:
        return multiclass_calibration_error(p, target, p.shape[1], n_bins=BINS)
    known = ~target.isnan()
    return binary_calibration_error(p[known], target[known].long(), n_bins=BINS)


def judged(logits: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what `calibration_error` compares: probabilities, and whether what they are of was true.

    Shape:
        `[N]` both; of several labels all known ones, `[M]`.
    """
    p = probabilities(logits, target, temperature)
    if target.ndim == 1:
        best, answer = p.max(dim=-1)
        return best, answer == target
    known = ~target.isnan()
    return p[known], target[known] > 0.5


def ranking(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return average precision and area under the ROC curve of each label, of its known images.

    A label that has no positive or no negative among them has NaN.

    Shape:
        logits, target `[N, K]` -> `[K]` both.
    """
    truth = torch.where(target.isnan(), UNKNOWN, target).long()
    both = (truth == 1).any(dim=0) & (truth == 0).any(dim=0)
    p, count = logits.double().sigmoid(), int(both.sum())
    found = torch.full((2, logits.shape[1]), torch.nan, dtype=torch.float64, device=logits.device)
    for row, measure in zip(found, (multilabel_average_precision, multilabel_auroc), strict=True):
        if count > 1:
            row[both] = measure(
                p[:, both], truth[:, both], count, average="none", ignore_index=UNKNOWN
            ).double()
        elif count:  # torchmetrics takes two labels or more
            twice = both.nonzero()[:, 0].expand(2)
            row[both] = measure(
                p[:, twice], truth[:, twice], 2, average="macro", ignore_index=UNKNOWN
            ).double()
    return found[0], found[1]


def figures(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the figures of a split: top1 and top5, or map and auroc (means over labels)."""
    if target.ndim == 1:
        found = {"top1": top_k(logits, target, 1)}
        return found | ({"top5": top_k(logits, target, 5)} if logits.shape[1] > 5 else {})
    precision, area = ranking(logits, target)
    return {"map": precision.nanmean().float(), "auroc": area.nanmean().float()}


def confusion(logits: Tensor, target: Tensor) -> NDArray[np.int64]:
    """Return how many images of each class (rows) were given each class (columns)."""
    found = multiclass_confusion_matrix(logits.argmax(dim=-1), target, logits.shape[1])
    return cast("NDArray[np.int64]", found.numpy())


def by_class(logits: Tensor, target: Tensor, labels: Sequence[str]) -> pd.DataFrame:
    """Return a row a class: label, precision, recall, f1, support; of several labels also those of ranking.

    Of several labels the answer is yes above a probability of 0.5. What is undefined (0 of 0) is NaN.
    """
    if target.ndim == 1:
        matrix = confusion(logits, target)
        hits, given, there = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    else:
        known, answer, truth = ~target.isnan(), logits > 0, target > 0.5
        hits = (answer & truth & known).sum(dim=0).numpy()
        given, there = (answer & known).sum(dim=0).numpy(), (truth & known).sum(dim=0).numpy()
    with np.errstate(invalid="ignore"):
        table = {"precision": hits / given, "recall": hits / there, "f1": 2 * hits / (given + there)}
    found = pd.DataFrame({"label": list(labels), **table, "support": there})
    if target.ndim == 2:
        precision, area = ranking(logits, target)
        found["known"] = (~target.isnan()).sum(dim=0).numpy()
        found["average_precision"], found["auroc"] = precision.numpy(), area.numpy()
    return found


def lines(table: pd.DataFrame) -> list[str]:
    """Return a report's lines for a terminal: all of few classes, else the worst and the best by f1."""
    if len(table) > ALL_SHOWN:
        table = table.sort_values("f1", kind="stable", na_position="first")
        worst, best = _text(table.head(ENDS_SHOWN)), _text(table.tail(ENDS_SHOWN))
        return [f"the {ENDS_SHOWN} worst classes by f1:", *worst, f"the {ENDS_SHOWN} best:", *best]
    return _text(table)


def _text(table: pd.DataFrame) -> list[str]:
    return table.to_string(index=False, float_format=lambda value: f"{value:.4f}").splitlines()
