"""Rolling windows over the last part of series: a model asked for rows that are known.

Forecasts are returned to the data's own units before they are measured, so that models which scaled their
data by other rows, such as one that was trained again, are measured alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calendar import split_freq
from manyheads.timeseries.calls import forecast
from manyheads.timeseries.data import Split, split_rows
from manyheads.timeseries.frames import Series
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.scaling import window_statistics
from manyheads.timeseries.treatment import Range, Treatment, lay_out
from manyheads.timeseries.windows import Batch, Windows

_SEASONS = {"s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52}
_SEASONS |= {"MS": 12, "ME": 12, "QS": 4, "QE": 4, "YS": 1, "YE": 1}


def season_of(freq: str) -> int:
    """Return the usual season of a frequency in rows; 1 where it has no whole number of them.

    It is an hour of seconds, a day of minutes or hours, a week of days, a year of weeks, months or quarters.

    Example:
        >>> season_of("15min")
        96
    """
    multiple, unit, _ = split_freq(freq)
    return _SEASONS[unit] // multiple if _SEASONS[unit] % multiple == 0 else 1


class Parts(NamedTuple):
    """Rows of a series; calibration and test begin with seq_len rows of history."""

    train: Range
    calibration: Range
    test: Range


def cut(series: Sequence[Series], of: Preprocessing, split: Split | None, rows: int | None) -> list[Parts]:
    """Say which rows of each series are tested.

    Args:
        series: The series.
        of: The model's seq_len and pred_len.
        split: By which rule; None takes the last `rows` rows.
        rows: How many rows to test where no split says it; None tests the last fifth.

    Raises:
        DataError: A series has no window there; names it.
    """
    return [_cut(each, of, split, rows) for each in series]


def _cut(series: Series, of: Preprocessing, split: Split | None, rows: int | None) -> Parts:
    n, length = len(series.ds), of.seq_len + of.pred_len
    where = f"series {series.id!r} of {n} rows is too short:"
    if split is not None or rows is None:
        try:
            parts = Parts(*split_rows(n, split or "ratio", of.seq_len))
        except DataError as error:
            raise DataError(f"series {series.id!r} has {error}") from None
    else:
        if n < of.seq_len + rows:
            raise DataError(f"{where} its windows take {of.seq_len} + {rows} rows; lower --windows or --step")
        first = max(0, n - 2 * rows - of.seq_len)
        parts = Parts((0, n - rows), (first, n - rows), (n - rows - of.seq_len, n))
    first, end = parts.test
    if first < 0 or end - first < length:
        least = f"{of.seq_len} + {of.pred_len}"
        raise DataError(
            f"{where} its last fifth has no window of {least} rows; give --windows, or leave the series out"
            if split is None
            else f"{where} its test part has no window of {least} rows; leave the series out"
        )
    return parts


class Schedule:
    """Which windows are tested: of each series every `step`-th, the last of which ends with the test part.

    Args:
        series: The series.
        parts: Their parts.
        of: The model's seq_len and pred_len.
        step: Rows from a window to the next.
        windows: Windows of each series, the last ones; None for all.

    Raises:
        UsageError: A series has not got so many windows.
    """

    def __init__(
        self,
        series: Sequence[Series],
        parts: Sequence[Parts],
        of: Preprocessing,
        step: int = 1,
        windows: int | None = None,
    ) -> None:
        length = of.seq_len + of.pred_len
        tested = np.array([part.test for part in parts], np.int64)
        counts = tested[:, 1] - tested[:, 0] - length + 1
        there = (counts - 1) // step + 1
        if windows is not None and windows > there.min():
            i = int(there.argmin())
            raise UsageError(
                f"series {series[i].id!r} has {there[i]} windows in its test part at step {step}, "
                f"not {windows}; lower --windows or --step"
            )
        self.numbers = there if windows is None else np.full_like(there, windows)
        self.step, self._last = step, np.cumsum(counts) - 1
        self._ends = tested[:, 1] - of.pred_len  # row of the last window's first target

    @property
    def total(self) -> int:
        """How many windows there are."""
        return int(self.numbers.sum())

    def blocks(self, refit: int | None) -> list[Range]:
        """Return the numbers of the windows that one model forecasts, of every series alike."""
        most = int(self.numbers.max())
        return [(first, min(first + (refit or most), most)) for first in range(0, most, refit or most)]

    def first_targets(self, number: int) -> list[int]:
        """Return the row at which each series' window of a number begins to forecast, or its last window."""
        left = np.maximum(self.numbers - 1 - number, 0)
        return (self._ends - left * self.step).tolist()

    def batches(self, block: Range, size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the windows of a block, series by series in the order of time."""
        here = np.clip(self.numbers - block[0], 0, block[1] - block[0])
        ends = np.cumsum(here)
        for first in range(0, int(ends[-1]), size):
            i = np.arange(first, min(first + size, int(ends[-1])))
            series = np.searchsorted(ends, i, side="right")
            number = block[0] + i - (ends[series] - here[series])
            yield self._last[series] - (self.numbers[series] - 1 - number) * self.step

    def last(self, series: int) -> NDArray[np.int64]:
        """Return a series' last window, as a batch of one."""
        return self._last[series : series + 1]


class Answer(NamedTuple):
    """A batch's forecasts in the data's own units, float64, with what came."""

    point: Tensor  # [B, P, N]
    quantiles: Tensor | None  # [B, P, N, Q]
    y: Tensor  # [B, P, N], NaN where missing
    series: Tensor  # [B]
    scale: Tensor  # [B, 1, N], what the model's outputs were multiplied by
    rows: NDArray[np.int64]  # [B] of its series, where the forecast begins

    def at(self, i: int) -> Answer:
        """Return one window's, as a batch of one."""
        one = slice(i, i + 1)
        quantiles = None if self.quantiles is None else self.quantiles[one]
        return Answer(
            self.point[one], quantiles, self.y[one], self.series[one], self.scale[one], self.rows[one]
        )


class RollingModel:
    """A model with the rows of all series, treated as its train data were.

    A series or column that those had not is scaled by each context window, as in prediction.

    Args:
        model: Any forecasting module of the catalogue.
        of: How its train data were treated.
        series: The series.

    Raises:
        DataError: Not the columns that the model is built for.
    """

    def __init__(self, model: nn.Module, of: Preprocessing, series: Sequence[Series]) -> None:
        self.model, self.of, self._columns = model.eval(), of, series[0].columns
        variates = getattr(model, "variates", None)
        if variates is not None and self._columns != of.columns and (variates, len(self._columns)) != (1, 1):
            raise DataError(
                "this model takes the columns that it was trained on, in their order: "
                f"{', '.join(of.columns)}; not {', '.join(self._columns)}"
            )
        table = lay_out(series, of.treatment)
        self._rows, self._static, self._offsets = table.rows, table.static, np.array(table.offsets)
        statistics = [of.treatment.statistics(each.id, self._columns, each.values) for each in series]
        mean, scale = (torch.from_numpy(np.stack(each)) for each in zip(*statistics, strict=True))
        self._mean, self._scale = mean[:, None], scale[:, None]  # [S, 1, N]
        known = [known_columns(of.treatment, each.id, self._columns) for each in series]
        self._strange = torch.tensor(known).logical_not()[:, None]  # [S, 1, N]

    def windows(self, ranges: Sequence[Range]) -> Windows:
        """Return the windows of some rows of each series."""
        of, covariates = self.of, self.of.treatment.covariates
        placed = [(a + at, b + at) for at, (a, b) in zip(self._offsets.tolist(), ranges, strict=True)]
        sizes = len(covariates.past.columns), len(covariates.future.columns)
        lengths = of.seq_len, of.pred_len
        masked = of.missing == "mask"
        return Windows(self._rows, len(self._columns), placed, *lengths, *sizes, self._static, masked)

    def ask(self, windows: Windows, indices: NDArray[np.integer], levels: Sequence[float] = ()) -> Answer:
        """Forecast some windows.

        Raises:
            UsageError: The model has not got one of the levels.
        """
        batch, y, mean, scale = self.inputs(windows, indices)
        with torch.inference_mode():
            made = forecast(self.model, batch, levels)
        quantiles = made.quantiles
        if quantiles is not None:
            quantiles = quantiles.double().cpu() * scale[..., None] + mean[..., None]
        series = batch["series"].cpu()
        first = windows.locate(indices)[1] - self._offsets[series.numpy()] + self.of.seq_len
        return Answer(made.point.double().cpu() * scale + mean, quantiles, y, series, scale, first)

    def inputs(self, windows: Windows, indices: NDArray[np.integer]) -> tuple[Batch, Tensor, Tensor, Tensor]:
        """Return some windows as the model is given them, on its device and without their truth.

        Returns:
            The batch; the truth in own units `[B, P, N]`; what outputs are shifted and multiplied by, each
            `[B, 1, N]`.
        """
        batch = windows.gather(indices)
        mean, scale = self._mean[batch["series"]], self._scale[batch["series"]]
        y = batch["y"].double() * scale + mean
        if self._strange.any():
            batch["x"], mean, scale = self._by_window(batch, mean, scale)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        given = {**batch, "y": torch.full_like(batch["y"], torch.nan)}
        moved = {key: cast(Tensor, value).to(device) for key, value in given.items()}
        return cast(Batch, moved), y, mean, scale

    def _by_window(self, batch: Batch, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale the columns that are not known by each context window."""
        own = batch["x"].double() * scale + mean
        seen = own if "observed" not in batch else torch.where(batch["observed"], own, torch.nan)
        found = [window_statistics(each) for each in seen.numpy()]
        strange = self._strange[batch["series"]]
        new = [torch.from_numpy(np.stack(each))[:, None] for each in zip(*found, strict=True)]
        mean, scale = (torch.where(strange, a, b) for a, b in zip(new, (mean, scale), strict=True))
        return torch.where(strange, ((own - mean) / scale).float(), batch["x"]), mean, scale


def known_columns(treatment: Treatment, ident: str, columns: Sequence[str]) -> list[bool]:
    """Say of which columns of a series the train rows had the statistics; of all, where none are used."""
    if treatment.scaling in ("window", "none"):
        return [True] * len(columns)
    by = treatment.scaler if treatment.series_scaler is None else treatment.series_scaler.of(ident)
    return [by is not None and name in by.columns for name in columns]


def units(series: Sequence[Series], parts: Sequence[Parts], of: Preprocessing) -> Tensor:
    """Return what scaled errors are divided by: the train data's scale; of what they had not, that of its own
    train rows.

    Shape:
        `[S, N]`.
    """
    pairs = zip(series, parts, strict=True)
    found = [of.treatment.statistics(s.id, s.columns, s.values[slice(*part.train)])[1] for s, part in pairs]
    return torch.from_numpy(np.stack(found))
