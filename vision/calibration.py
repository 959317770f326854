"""Temperature scaling (arXiv 1706.04599): one number by which logits are divided."""

from __future__ import annotations

import math

from torch import Tensor

COLDEST, HOTTEST = 0.05, 20.0
HALVINGS = 30  # of the logarithm's range: far below what single precision tells apart


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """Return the temperature at which the logits' likelihood is highest.

    The loss is convex in the inverse temperature, so its slope has one root, which is found by halving.
    Where there is none, as of logits that are always right, it goes on until nothing changes.

    Args:
        logits: Of images that the weights were not fitted to.
        target: Their classes, or 0, 1 and NaN (unknown) for each label.

    Shape:
        logits `[N, K]`, target `[N]` int64 or `[N, K]`.
    """
    logits = logits.double()  # single precision has no slope left where almost all is right
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _slope(logits, target, math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def _slope(logits: Tensor, target: Tensor, inverse: float) -> float:
    """Return the derivative of the summed loss by the inverse temperature."""
    if target.ndim == 1:
        expected = ((logits * inverse).softmax(dim=-1) * logits).sum(dim=-1)
        observed = logits.gather(1, target[:, None])[:, 0]
        return float((expected - observed).sum())
    each = ((logits * inverse).sigmoid() - target) * logits
    return float(each.nansum())
