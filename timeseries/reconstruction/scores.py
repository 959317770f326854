"""How little a row fits its reconstruction, and from where on that is an anomaly.

Source: arXiv 2210.02186, section 4 (scores are reconstruction errors). Figures count rows one by one: nothing
is point-adjusted, which would count a whole labelled stretch as found when one of its rows is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core.errors import DataError
from manyheads.timeseries.reconstruction.masks import turns


def rebuild(model: nn.Module, x: Tensor, observed: Tensor, x_mark: Tensor, passes: int, gap: int) -> Tensor:
    """Rebuild windows, each cell from all of its window, or without itself and what stands beside it.

    Args:
        model: Maps x, observed and x_mark to windows.
        passes: 1 hides nothing; of several, each hides its share of the cells, and rebuilds these.
        gap: Steps of a run of hidden cells.

    Shape:
        x, observed `[B, L, N]` -> `[B, L, N]`.
    """
    if passes == 1:
        return model(x, observed, x_mark)
    turn, made = turns(x.shape[1], x.shape[2], passes, gap).to(x.device), x
    for i in range(passes):
        made = torch.where(turn == i, model(x, observed & (turn != i), x_mark), made)
    return made


def row_scores(rebuilt: Tensor, x: Tensor, observed: Tensor) -> Tensor:
    """Return squared errors of scaled values: their mean over a row's observed variates, then each.

    Shape:
        rebuilt, x, observed `[..., N]` -> `[..., 1 + N]` float64, NaN where nothing is observed.
    """
    errors = (rebuilt.double() - x.double()).square().where(observed, float("nan"))
    return torch.cat([errors.nanmean(dim=-1, keepdim=True), errors], dim=-1)


def fit_thresholds(scores: Tensor, quantile: float, columns: Sequence[str]) -> Tensor:
    """Return the quantile of the rows' scores, and of each column's; above it is an anomaly.

    Shape:
        scores `[R, 1 + N]` -> `[1 + N]`.

    Raises:
        DataError: Nothing of a column is observed.
    """
    empty = scores.isnan().all(dim=0).tolist()
    if any(empty):
        column = columns[max(0, empty.index(True) - 1)]
        raise DataError(
            f"column {column!r} has no value in the validation rows, so no score shows what is usual"
        )
    found: NDArray[np.float64] = np.nanquantile(scores.cpu().numpy(), quantile, axis=0)
    return torch.from_numpy(found)


def figures(scores: Tensor, labels: Tensor, threshold: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 at a threshold, and the area under the ROC curve, row by row.

    Args:
        scores: The rows' scores.
        labels: 1 for an anomaly, 0 for none; rows with NaN here or there do not count.
        threshold: What an anomaly's score is above.

    Shape:
        scores, labels `[R]`, threshold `[]`.

    Raises:
        DataError: The labels are all the same.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_f1_score,
        binary_precision,
        binary_recall,
    )

    told = ~(labels.isnan() | scores.isnan())
    scores, truth = scores[told], labels[told].long()
    if not 0 < int(truth.sum()) < len(truth):
        raise DataError(
            f"the {len(truth)} labelled test rows are all {'anomalies' if truth.any() else 'usual'}"
        )
    flagged = (scores > threshold).long()
    return {
        "precision": binary_precision(flagged, truth),
        "recall": binary_recall(flagged, truth),
        "f1": binary_f1_score(flagged, truth),
        "auroc": binary_auroc(scores / (1 + scores), truth),  # it takes the scores for probabilities
    }
