"""What a forecast is: a point, quantiles, or a distribution, made of a network's raw outputs.

The first raw output of every step and variate is a location, so that a network which carries a trend can
carry it there. All heads train and answer in the units of the batch: the scaling of windows is undone here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.timeseries.calls import Forecast, check_levels
from manyheads.timeseries.distributions import DISTRIBUTIONS, Distribution
from manyheads.timeseries.metrics import masked_mse

OUTPUTS = ("point", "quantile", *DISTRIBUTIONS)


class Head(Protocol):
    """Reads raw outputs `[B, P, N, K]` of windows that loc and scale, each `[B, 1, N]`, were taken out of."""

    outputs: int  # K
    levels: tuple[float, ...] | None  # the quantiles that it has; None for any

    def loss(self, raw: Tensor, y: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the mean loss over the targets `[B, P, N]` that are not NaN."""

    def forecast(
        self, raw: Tensor, loc: Tensor | None, scale: Tensor | None, levels: Sequence[float]
    ) -> Forecast:
        """Forecast, with quantiles of some levels that it has."""


def restore(z: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
    """Undo a window's scaling."""
    z = z if scale is None else z * scale
    return z if loc is None else z + loc


def masked_mean(values: Tensor, y: Tensor) -> Tensor:
    """Return the mean of values where y is not NaN; 0 if it is everywhere.

    Shape:
        values, y `[B, P, N]` -> `[]`.
    """
    missing = y.isnan()
    return torch.where(missing, 0.0, values).sum() / (y.numel() - missing.sum()).clamp(min=1)


def pinball(quantiles: Tensor, y: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the pinball loss of each target, a mean over the levels; NaN targets give 0.

    Shape:
        quantiles `[B, P, N, Q]`, y `[B, P, N]` -> `[B, P, N]`.
    """
    error = y.nan_to_num()[..., None] - quantiles
    of = torch.tensor(levels, dtype=quantiles.dtype, device=quantiles.device)
    loss = torch.maximum(of * error, (of - 1) * error).mean(-1)
    return torch.where(y.isnan(), 0.0, loss)


class PointHead:
    """One number a step and variate, trained on its squared error: the mean."""

    outputs = 1
    levels: tuple[float, ...] | None = ()

    def loss(self, raw: Tensor, y: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the mean squared error."""
        return masked_mse(restore(raw[..., 0], loc, scale), y)

    def forecast(
        self, raw: Tensor, loc: Tensor | None, scale: Tensor | None, levels: Sequence[float]
    ) -> Forecast:
        """Return the point forecast."""
        return Forecast(restore(raw[..., 0], loc, scale), None)


class QuantileHead:
    """Quantiles of given levels, trained on their pinball loss; the point forecast is the median.

    The first output is the median, asked for or not, and the others are the distances from one quantile to
    the next, made positive: quantiles cannot cross, in training as after it. (Sorting would do that too, but
    then every output would be a location, and its meaning would change with its value.) Zeros give the
    quantiles of a standard normal distribution, which is how scaled windows are spread.

    Args:
        levels: Levels of the quantiles, rising.

    Raises:
        UsageError: The levels do not rise or do not lie in (0, 1).
    """

    def __init__(self, levels: Sequence[float]) -> None:
        check_levels(levels)
        self.levels: tuple[float, ...] | None = tuple(levels)
        self._all = tuple(sorted({*levels, 0.5}))
        self._median = self._all.index(0.5)
        self.outputs = len(self._all)
        normal = [NormalDist().inv_cdf(level) for level in self._all]
        self._gaps = [after - before for before, after in pairwise(normal)]

    def loss(self, raw: Tensor, y: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the mean pinball loss over levels and targets, the median among the levels."""
        return masked_mean(pinball(self._quantiles(raw, loc, scale), y, self._all), y)

    def forecast(
        self, raw: Tensor, loc: Tensor | None, scale: Tensor | None, levels: Sequence[float]
    ) -> Forecast:
        """Return median and quantiles."""
        quantiles = self._quantiles(raw, loc, scale)
        chosen = [self._all.index(level) for level in levels]
        return Forecast(quantiles[..., self._median], quantiles[..., chosen] if chosen else None)

    def _quantiles(self, raw: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the quantiles of all levels `[B, P, N, K]`."""
        if self.outputs > 1:
            gaps = raw.new_tensor(self._gaps) / math.log(2)
            below, above = (F.softplus(raw[..., 1:]) * gaps).tensor_split([self._median], dim=-1)
            median = raw[..., :1]
            lower = median - below.flip(-1).cumsum(-1).flip(-1)
            raw = torch.cat([lower, median, median + above.cumsum(-1)], dim=-1)
        wide = (None if each is None else each[..., None] for each in (loc, scale))
        return restore(raw, *wide)


class DistributionHead:
    """The parameters of a distribution, trained on its log-likelihood; the point forecast is the mean.

    Args:
        name: A name of `DISTRIBUTIONS`.
    """

    levels: tuple[float, ...] | None = None

    def __init__(self, name: str) -> None:
        self.name, self._distribution = name, DISTRIBUTIONS[name]
        self.outputs = self._distribution.size
        names = self._distribution.names
        location = names.index("loc" if "loc" in names else "logits")
        # The network's first output is the distribution's location, the others keep their order.
        self._order = [*range(1, location + 1), 0, *range(location + 1, len(names))]

    def loss(self, raw: Tensor, y: Tensor, loc: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the mean negative log-likelihood.

        Raises:
            DataError: The distribution is of counts, and a target is none.
        """
        if self.name == "negative_binomial":
            _check_counts(y)
        return masked_mean(-self._of(raw, loc, scale).log_prob(y.nan_to_num()), y)

    def forecast(
        self, raw: Tensor, loc: Tensor | None, scale: Tensor | None, levels: Sequence[float]
    ) -> Forecast:
        """Return mean and quantiles."""
        made = self._of(raw, loc, scale)
        return Forecast(made.mean, made.quantile(levels) if levels else None)

    def _of(self, raw: Tensor, loc: Tensor | None, scale: Tensor | None) -> Distribution:
        return self._distribution.of(raw[..., self._order], loc, scale)


def _check_counts(y: Tensor) -> None:
    wrong = (y < 0) | (y != y.round()) & ~y.isnan()
    if bool(wrong.any()):
        raise DataError(
            f"negative_binomial forecasts counts, and a target is {y[wrong][0]:g}; "
            "leave the data unscaled (scaling none), or choose student_t for what is no count"
        )


def make_head(output: str, quantiles: Sequence[float] | None) -> Head:
    """Build the head of a name.

    Args:
        output: One of `OUTPUTS`.
        quantiles: Levels of the quantile head, and of it alone.

    Raises:
        UsageError: No such head, quantiles missing, out of order or of no use.
    """
    if output not in OUTPUTS:
        raise UsageError(f"no output {output!r}{did_you_mean(output, OUTPUTS)} ({', '.join(OUTPUTS)})")
    if output == "quantile":
        if not quantiles:
            raise UsageError("output quantile needs its quantiles, as [0.1, 0.5, 0.9]")
        return QuantileHead(quantiles)
    if quantiles is not None:
        raise UsageError(f"quantiles are for output quantile, not {output}")
    return PointHead() if output == "point" else DistributionHead(output)
