"""How a forecasting module of the catalogue is asked for a forecast or a loss, whatever kind it is.

A plain module maps `(x, x_mark, y_mark)` to a point forecast and is trained on its squared error. One that
has covariates, quantiles or a distribution is a `Probabilistic`: it takes the whole batch and answers itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.metrics import masked_mse
from manyheads.timeseries.windows import Batch


class Forecast(NamedTuple):
    """A batch's forecast, in the units of the batch."""

    point: Tensor  # [B, P, N]
    quantiles: Tensor | None  # [B, P, N, Q], in the order of the levels that were asked for


@runtime_checkable
class Probabilistic(Protocol):
    """A module that takes a whole batch."""

    levels: tuple[float, ...] | None  # the quantiles that it has; None for any

    def predict(self, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
        """Forecast a batch, with quantiles of some levels that it has."""

    def loss(self, batch: Batch) -> Tensor:
        """Return what training minimises: a mean over the targets that are not NaN."""


def forecast(model: nn.Module, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
    """Forecast a batch.

    Args:
        model: Any forecasting module of the catalogue.
        batch: The windows; `y` is not read.
        levels: Quantiles wanted, rising; none gives `quantiles` None.

    Raises:
        UsageError: The levels are out of order, or the model has not got one of them.

    Example:
        >>> forecast(model, batch, levels=[0.1, 0.9]).quantiles[..., 1]  # the upper end
    """
    check_levels(levels)
    if isinstance(model, Probabilistic):
        check_known(levels, model.levels)
        return model.predict(batch, levels)
    check_known(levels, ())
    return Forecast(model(batch["x"], batch["x_mark"], batch["y_mark"]), None)


def training_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a batch: the model's own, or the squared error over the targets that are not NaN.

    Shape:
        `[]`.
    """
    if isinstance(model, Probabilistic):
        return model.loss(batch)
    return masked_mse(forecast(model, batch).point, batch["y"])


def check_levels(levels: Sequence[float], name: str = "quantiles") -> None:
    """Refuse levels that are no probabilities or do not rise.

    Args:
        levels: What was given.
        name: What to call them.

    Raises:
        UsageError: The first that is wrong.
    """
    for level in levels:
        if not 0 < level < 1:
            raise UsageError(f"{name}: {level} is not between 0 and 1")
    for before, after in pairwise(levels):
        if after <= before:
            raise UsageError(f"{name} out of order: {after} after {before}; give them rising, each once")


def check_known(levels: Sequence[float], known: tuple[float, ...] | None) -> None:
    """Refuse levels that a model has not.

    Args:
        levels: What was asked for.
        known: What the model has; None for any.

    Raises:
        UsageError: The first that it has not.
    """
    unknown = [level for level in levels if known is not None and level not in known]
    if unknown:
        there = f"has the quantiles {', '.join(map(str, known))}" if known else "has no quantiles"
        raise UsageError(f"no quantile {unknown[0]}: the model {there}")
