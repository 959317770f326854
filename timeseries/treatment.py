"""How values and covariates become a model's inputs, and its outputs values: in training and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import DataError, did_you_mean
from manyheads.timeseries.calendar import feature_names, time_features
from manyheads.timeseries.covariates import Covariates, Role, Unseen
from manyheads.timeseries.frames import Series
from manyheads.timeseries.layout import Layout
from manyheads.timeseries.scaling import Floats, Scaling, SeriesScaler, StandardScaler, window_statistics
from manyheads.timeseries.tables import Cells, Coded, Where

Range = tuple[int, int]  # first row and end row
_NO_COVARIATES, _NOTHING = Covariates(), StandardScaler.identity(())


@dataclass(frozen=True)
class Treatment:
    """Scaling of the targets, scaling and codes of the covariates, all fitted on the train rows.

    Args:
        scaler: The targets' scaler over all series.
        scaling: "global": by that; "series": each series by its own train rows, an unknown one by its context
            window; "window" and "none": not at all, for the model does it, or nobody.
        series_scaler: The scaler a series, for "series".
        covariates: The covariates, with the categories of the train rows.
        covariate_scaler: The scaler of the numeric ones, over all series.
        unseen: Whether a category that the train rows had not is refused, or becomes "unknown".
    """

    scaler: StandardScaler
    scaling: Scaling = "global"
    series_scaler: SeriesScaler | None = None
    covariates: Covariates = _NO_COVARIATES
    covariate_scaler: StandardScaler = _NOTHING
    unseen: Unseen = "refuse"

    def statistics(self, ident: str, columns: Sequence[str], context: Floats) -> tuple[Floats, Floats]:
        """Return mean and scale of the columns of a series.

        Args:
            ident: The series' id.
            columns: Its target columns.
            context: Its context window, which speaks for what the train rows had not got.

        Shape:
            context `[L, N]`; returns `[N]` and `[N]`.
        """
        if self.scaling in ("window", "none"):
            return np.zeros(len(columns)), np.ones(len(columns))
        if self.series_scaler is None:
            return self.scaler.for_columns(columns, context)
        known = self.series_scaler.of(ident)
        return known.for_columns(columns, context) if known else window_statistics(context)

    def encode(self, role: Role, cells: Mapping[str, Cells], rows: int, where: Where) -> NDArray[np.float32]:
        """Scale and code the covariates of a role; a missing number stays NaN.

        Args:
            role: One of the covariates' roles.
            cells: Its columns of one series.
            rows: How many cells each has.
            where: Names a cell's row.

        Shape:
            Returns `[rows, C]`.

        Raises:
            DataError: A category that is not known, and is refused; names the column, value and row.
        """
        scaler, made = (
            self.covariate_scaler.take(role.numeric),
            np.empty((rows, len(role.columns)), np.float32),
        )
        for j, name in enumerate(role.numeric):
            made[:, j] = (cells[name] - scaler.mean[j]) / scaler.scale[j]
        for j, (name, known) in enumerate(role.categories.items(), len(role.numeric)):
            column = cells[name]
            assert isinstance(column, Coded)
            number = {value: i for i, value in enumerate(known, 1)}
            codes = np.array(
                [*(number.get(value, 0) for value in column.values), 0]
            )  # the last is for missing
            made[:, j] = codes[column.codes]
            if self.unseen == "refuse" and not codes[:-1].all():
                _refuse_unseen(name, column, codes, known, where)
        return made

    def to_json(self) -> dict[str, object]:
        """Return plain JSON; what is as by default is left out."""
        saved: dict[str, object] = {"scaler": self.scaler.to_json()}
        if self.scaling != "global":
            saved["scaling"] = self.scaling
        if self.series_scaler is not None:
            saved["series_scaler"] = self.series_scaler.to_json()
        if self.covariates:
            saved["covariates"] = self.covariates.to_json()
            saved["covariate_scaler"] = self.covariate_scaler.to_json()
            saved["unseen"] = self.unseen
        return saved


def _refuse_unseen(
    name: str, column: Coded, codes: NDArray[np.int64], known: Sequence[str], where: Where
) -> None:
    """Refuse the first cell whose category is not known."""
    wrong = np.flatnonzero((column.codes >= 0) & (codes[column.codes] == 0))
    if len(wrong):
        value = column.values[column.codes[wrong[0]]]
        few = f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        raise DataError(
            f"{where(int(wrong[0]))}, column {name!r}: {value!r} is no category of the train rows ({few})"
            f'{did_you_mean(value, known)}; train with it, or with unseen="unknown"'
        )


def fit_treatment(
    series: Sequence[Series], train: Sequence[Range], layout: Layout, scaling: Scaling, unseen: Unseen
) -> Treatment:
    """Fit everything on the train rows.

    Args:
        series: All series.
        train: The train rows of each.
        layout: What the columns are.
        scaling: How the targets are scaled.
        unseen: What becomes of unknown categories.

    Raises:
        DataError: A column has no value in the train rows.
    """
    pairs = list(zip(series, train, strict=True))
    columns = series[0].columns
    raw = scaling in ("window", "none")
    fitted = StandardScaler.fit((s.values[a:b] for s, (a, b) in pairs), columns)
    by_series = None
    if scaling == "series":
        by_series = SeriesScaler.fit({s.id: s.values[a:b] for s, (a, b) in pairs}, columns)
    whole = [(s, (0, 1)) for s in series]
    past, future = (_fit_role(pairs, names, layout) for names in (layout.past, layout.future))
    covariates = Covariates(past, future, _fit_role(whole, layout.static, layout))
    scalers = [
        StandardScaler.fit(_numbers(some, role.numeric), role.numeric)
        for some, role in ((pairs, covariates.past), (pairs, covariates.future), (whole, covariates.static))
    ]
    mean, scale = (np.concatenate([getattr(each, key) for each in scalers]) for key in ("mean", "scale"))
    return Treatment(
        StandardScaler.identity(columns) if raw else fitted,
        scaling,
        by_series,
        covariates,
        StandardScaler(covariates.numeric, mean, scale),
        unseen,
    )


def _numbers(pairs: Sequence[tuple[Series, Range]], columns: Sequence[str]) -> Iterator[Floats]:
    """Yield the train rows of numeric covariates, series by series."""
    if columns:
        for each, (first, end) in pairs:
            yield np.stack([np.asarray(each.covariates[name][first:end]) for name in columns], axis=1)


def _fit_role(pairs: Sequence[tuple[Series, Range]], names: Sequence[str], layout: Layout) -> Role:
    """Find which values each categorical column of a role has in the train rows."""
    categories = {}
    for name in (name for name in names if name in layout.categorical):
        found: set[str] = set()
        for each, (first, end) in pairs:
            cells = each.covariates[name]
            assert isinstance(cells, Coded)
            there = np.bincount(cells.codes[first:end] + 1, minlength=len(cells.values) + 1)[1:]
            found.update(cells.values[i] for i in np.flatnonzero(there))
        if not found:
            raise DataError(f"column {name!r} has no value in the train rows; leave it out")
        categories[name] = tuple(sorted(found))
    return Role(tuple(name for name in names if name not in layout.categorical), categories)


class Table(NamedTuple):
    """The treated rows of all series, one under the other.

    Shape:
        rows `[R, N + M + Cp + Cf]`: targets, calendar features, past and future covariates; static `[S, Cs]`.
    """

    rows: Tensor
    static: Tensor | None
    offsets: list[int]  # where each series begins


def lay_out(series: Sequence[Series], treatment: Treatment) -> Table:
    """Treat all series, each in its place, so that nothing is held twice.

    Raises:
        DataError: A category is refused.
    """
    covariates, columns, freq = treatment.covariates, series[0].columns, series[0].freq
    offsets = np.cumsum([0, *(len(each.ds) for each in series)]).tolist()
    n, marks = len(columns), len(feature_names(freq))
    past = n + marks
    future = past + len(covariates.past.columns)
    rows = torch.empty((offsets[-1], future + len(covariates.future.columns)))
    static = torch.empty((len(series), len(covariates.static.columns)))
    table, ds = rows.numpy(), np.zeros(0, "datetime64[us]")
    features = time_features(ds, freq)
    for i, (each, first, end) in enumerate(zip(series, offsets, offsets[1:], strict=False)):
        if not np.array_equal(each.ds, ds):  # series mostly stand side by side in time
            ds, features = each.ds, time_features(each.ds, freq)
        where = _row_namer(each)
        mean, scale = treatment.statistics(each.id, columns, each.values)
        table[first:end, :n] = (each.values - mean) / scale
        table[first:end, n:past] = features
        table[first:end, past:future] = treatment.encode(covariates.past, each.covariates, end - first, where)
        table[first:end, future:] = treatment.encode(covariates.future, each.covariates, end - first, where)
        static[i] = torch.from_numpy(treatment.encode(covariates.static, each.covariates, 1, where))
    return Table(rows, static.nan_to_num_() if static.shape[1] else None, offsets[:-1])


def _row_namer(series: Series) -> Where:
    return lambda i: f"series {series.id!r} at {series.ds[i].item()}"
