"""Exact errors over a whole data set, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_mse(forecast: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error over the targets that are not NaN; 0 if all are.

    Shape:
        forecast, y `[B, P, N]` -> `[]`.
    """
    missing = y.isnan()
    error = torch.where(missing, 0.0, forecast - y)
    return error.square().sum() / (y.numel() - missing.sum()).clamp(min=1)


class ErrorSums:
    """Sums of errors in float64, so that means over all windows are exact; NaN targets are left out."""

    def __init__(self) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64)  # squares, absolute values, targets, windows

    def add(self, forecast: Tensor, y: Tensor) -> None:
        """Add a batch.

        Shape:
            forecast, y `[B, P, N]`.
        """
        missing = y.isnan()
        error = torch.where(missing, 0.0, forecast - y).detach()
        if error.device.type == "mps":  # has no float64
            error, missing = error.cpu(), missing.cpu()
        error = error.double()
        count = (y.numel() - missing.sum()).double()
        sums = [error.square().sum(), error.abs().sum(), count, torch.full_like(count, len(y))]
        self.totals = self.totals.to(error.device) + torch.stack(sums)

    @property
    def mse(self) -> Tensor:
        """Mean squared error; NaN before the first target."""
        return self.totals[0] / self.totals[2]

    @property
    def mae(self) -> Tensor:
        """Mean absolute error; NaN before the first target."""
        return self.totals[1] / self.totals[2]

    @property
    def windows(self) -> Tensor:
        """How many windows were added."""
        return self.totals[3]


def intervals(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Return the pairs of levels that bound a central interval, by their places, the widest first.

    Example:
        >>> intervals([0.1, 0.25, 0.5, 0.9])
        [(0, 3)]
    """
    mirrored = {round(1 - level, 9): i for i, level in enumerate(levels)}
    pairs = [(i, mirrored.get(round(level, 9))) for i, level in enumerate(levels) if level < 0.5]
    return [(low, high) for low, high in pairs if high is not None]


def seasonal_scale(rows: Tensor, season: int) -> Tensor:
    """Return the mean absolute error of the seasonal naive forecast within train rows, which MASE divides by.

    It is the mean of |y_t - y_{t-m}| over the rows that are observed with the one a season before.

    Args:
        rows: Train rows, NaN where missing.
        season: Rows in a season, m.

    Shape:
        rows `[T, N]` -> `[N]`; NaN where there is no such pair of rows, or the error is 0.

    Source:
        Hyndman and Koehler, "Another look at measures of forecast accuracy", 2006.
    """
    if len(rows) <= season:
        return torch.full(rows.shape[1:], torch.nan, dtype=torch.float64)
    scale = (rows[season:] - rows[:-season]).abs().double().nanmean(dim=0)
    return torch.where(scale > 0, scale, torch.nan)


class SeriesSums:
    """Sums of errors a series and variate, in float64, of points and quantiles in the data's own units.

    What is kept does not grow with the windows. NaN targets count nowhere. With e = y - point, q the quantile
    of a level, and the means over the targets:

    - mse: mean of e^2; mae: mean of |e|. Both also scaled: of e divided by the unit.
    - mase: mean of |e| / naive, over the targets of columns that have one (`seasonal_scale`).
    - smape: mean of 2 |e| / (|y| + |point|), from 0 to 2; 0 where both are 0. As in the M4 competition, which
      gives it in percent.
    - wql: mean over the levels of 2 sum max(level (y - q), (level - 1) (y - q)) / sum |y|: the weighted
      quantile loss of GluonTS. With the one level 0.5 it is the sum of |e| over that of |y|.
    - below: share of the targets at or below the quantile, a level.
    - coverage, width: share of the targets within a central interval, bounds included, and its mean width.

    Overall figures are those of all targets together; mse, mae and widths in own units then mix the units of
    the columns.

    Args:
        unit: What scaled errors are divided by.
        naive: What MASE divides by; NaN leaves a column out of it.
        levels: Levels of the quantiles, rising.

    Shape:
        unit, naive `[S, N]`.

    Source:
        M4 competition (https://doi.org/10.1016/j.ijforecast.2019.04.014); GluonTS (arXiv 1906.05264).
    """

    def __init__(self, unit: Tensor, naive: Tensor, levels: Sequence[float] = ()) -> None:
        self.unit, self.naive, self.levels = unit.double(), naive.double(), tuple(levels)
        self.intervals = intervals(levels)
        plain = ("targets", "squares", "absolutes", "symmetric", "sizes")
        self._names = (*plain, *(f"{kind}{i}" for kind in ("loss", "below") for i in range(len(levels))))
        self._names += tuple(f"{kind}{i}" for kind in ("inside", "width") for i in range(len(self.intervals)))
        self._sums = torch.zeros((len(self._names), *unit.shape), dtype=torch.float64)
        self.windows = torch.zeros(len(unit), dtype=torch.int64)

    def add(self, point: Tensor, quantiles: Tensor | None, y: Tensor, series: Tensor) -> None:
        """Add a batch.

        Args:
            point: Forecasts.
            quantiles: Quantiles of the levels; None where there are no levels.
            y: Targets.
            series: Which series each window is of.

        Shape:
            point, y `[B, P, N]`, quantiles `[B, P, N, Q]`, series `[B]`.
        """
        point, y = point.double().cpu(), y.double().cpu()
        error, size = (y - point).abs(), y.abs() + point.abs()
        symmetric = torch.where(size > 0, 2 * error / size.clamp(min=1e-300), size)  # NaN stays NaN
        terms = [torch.ones_like(y), error.square(), error, symmetric, y.abs()]
        if quantiles is not None:
            terms += self._spread(quantiles.double().cpu(), y)
        missing = y.isnan()
        sums = torch.stack([torch.where(missing, 0.0, term).sum(dim=1) for term in terms])  # [K, B, N]
        self._sums.index_add_(1, series.cpu(), sums)
        self.windows += torch.bincount(series.cpu(), minlength=len(self.windows))

    def _spread(self, quantiles: Tensor, y: Tensor) -> list[Tensor]:
        """Return what is summed of quantiles."""
        level = quantiles.new_tensor(self.levels)
        above = y[..., None] - quantiles
        loss = torch.maximum(level * above, (level - 1) * above)
        inside = [(above[..., low] >= 0) & (above[..., high] <= 0) for low, high in self.intervals]
        width = [quantiles[..., high] - quantiles[..., low] for low, high in self.intervals]
        return [
            *loss.unbind(-1),
            *(above <= 0).double().unbind(-1),
            *(each.double() for each in inside),
            *width,
        ]

    def by_series(self) -> dict[str, Tensor]:
        """Return the figures of each series and variate; NaN where there is no target.

        Shape:
            Each `[S, N]`; below `[S, N, Q]`, coverage and the widths `[S, N, I]`.
        """
        return self._figures(self._sums, self.unit, self.naive)

    def overall(self) -> dict[str, Tensor]:
        """Return the figures of all targets together.

        Shape:
            Each `[]`; below `[Q]`, coverage and the widths `[I]`.
        """
        sums = dict(zip(self._names, self._sums, strict=True))
        unit = {"squares": self.unit.square(), "absolutes": self.unit}
        scaled = {name: (sums[name] / by).sum() for name, by in unit.items()}
        made = self._figures(self._sums.sum(dim=(1, 2)), torch.ones(()), torch.ones(()))
        targets, known = sums["targets"].sum(), ~self.naive.isnan()
        made["mse_scaled"], made["mae_scaled"] = scaled["squares"] / targets, scaled["absolutes"] / targets
        made["mase"] = (sums["absolutes"] / self.naive)[known].sum() / sums["targets"][known].sum()
        widths = [(sums[f"width{i}"] / self.unit).sum() / targets for i in range(len(self.intervals))]
        made["width_scaled"] = torch.stack(widths) if widths else targets.new_zeros(0)
        return made

    def _figures(self, table: Tensor, unit: Tensor, naive: Tensor) -> dict[str, Tensor]:
        sums = dict(zip(self._names, table, strict=True))
        targets = sums["targets"]

        def each(kind: str, count: int, over: Tensor) -> Tensor:
            parts = [sums[f"{kind}{i}"] / over for i in range(count)]
            return torch.stack(parts, dim=-1) if parts else targets.new_zeros((*targets.shape, 0))

        mse, mae, n = sums["squares"] / targets, sums["absolutes"] / targets, len(self.levels)
        width = each("width", len(self.intervals), targets)
        return {
            "targets": targets,
            "mse_scaled": mse / unit.square(),
            "mae_scaled": mae / unit,
            "mse": mse,
            "mae": mae,
            "mase": mae / naive,
            "smape": sums["symmetric"] / targets,
            "wql": 2 * each("loss", n, sums["sizes"]).mean(-1) if n else torch.full_like(mse, torch.nan),
            "below": each("below", n, targets),
            "coverage": each("inside", len(self.intervals), targets),
            "width": width,
            "width_scaled": width / unit[..., None],
        }
