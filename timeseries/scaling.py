"""Standardisation per column, over all series or in each, fitted on the train rows, saved to the last bit.

Source: the published protocol scales each variate by the train rows' mean and population deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

Floats = NDArray[np.float64]
Scaling = Literal["global", "series", "window", "none"]


def _moments(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return count, mean and summed squares about the mean of the observed rows of each column."""
    there = ~np.isnan(values)
    count = there.sum(axis=0).astype(np.float64)
    mean = np.where(there, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    return count, mean, np.square(np.where(there, values - mean, 0.0)).sum(axis=0)


def _scale(count: Floats, mean: Floats, squares: Floats) -> Floats:
    """Population deviation; 1 where a column is constant, so that it becomes 0."""
    deviation = np.sqrt(squares / np.maximum(count, 1))
    # Rounding alone gives a constant column of size m a deviation of some 1e-16 m.
    return np.where(deviation <= 1e-12 * np.abs(mean), 1.0, deviation)


def window_statistics(values: Floats) -> tuple[Floats, Floats]:
    """Return the mean and deviation of each column of one context window; 0 and 1 where nothing is observed.

    Shape:
        values `[L, N]`; returns `[N]` and `[N]`.
    """
    count, mean, squares = _moments(values)
    return mean, _scale(count, mean, squares)


@dataclass(frozen=True)
class StandardScaler:
    """Mean and scale a column, in float64.

    A constant column has scale 1: it becomes 0 on the train rows, and keeps its own unit elsewhere.
    """

    columns: tuple[str, ...]
    mean: Floats = field(repr=False)
    scale: Floats = field(repr=False)

    @classmethod
    def fit(cls, tables: Iterable[Floats], columns: Sequence[str]) -> StandardScaler:
        """Fit on the train rows, pooled over the series; missing values do not count.

        Args:
            tables: One array of train rows a series; no two are held at a time.
            columns: The columns' names.

        Shape:
            Each table `[T, N]`.

        Raises:
            DataError: A column has no observed value in the train rows.
        """
        count, mean, squares = (np.zeros(len(columns)) for _ in range(3))
        for table in tables:
            more, its_mean, its_squares = _moments(table)
            both, apart = np.maximum(count + more, 1), its_mean - mean
            squares += its_squares + np.square(apart) * count * more / both
            mean = mean + apart * more / both
            count = count + more
        if not count.all():
            raise DataError(
                f"column {columns[int(count.argmin())]!r} has no value in the train rows; leave it out"
            )
        return cls(tuple(columns), mean, _scale(count, mean, squares))

    @classmethod
    def identity(cls, columns: Sequence[str]) -> StandardScaler:
        """Return the scaler that changes nothing."""
        return cls(tuple(columns), np.zeros(len(columns)), np.ones(len(columns)))

    def take(self, columns: Sequence[str]) -> StandardScaler:
        """Return the scaler of some of the columns."""
        at = [self.columns.index(name) for name in columns]
        return StandardScaler(tuple(columns), self.mean[at], self.scale[at])

    def transform(self, values: Floats) -> Floats:
        """Scale values.

        Shape:
            `[..., N]`.
        """
        return (values - self.mean) / self.scale

    def inverse(self, values: Floats) -> Floats:
        """Undo the scaling.

        Shape:
            `[..., N]`.
        """
        return values * self.scale + self.mean

    def for_columns(self, columns: Sequence[str], context: Floats) -> tuple[Floats, Floats]:
        """Return mean and scale of any columns: fitted, or for an unknown column its context window's own.

        Shape:
            context `[L, N]`; returns `[N]` and `[N]`.
        """
        known = {name: i for i, name in enumerate(self.columns)}
        mean, scale = np.zeros((2, len(columns)))
        if not set(columns) <= set(known):
            mean, scale = window_statistics(context)
        for j, name in enumerate(columns):
            if name in known:
                mean[j], scale[j] = self.mean[known[name]], self.scale[known[name]]
        return mean, scale

    def to_json(self) -> dict[str, list[str] | list[float]]:
        """Return plain lists; a float's JSON text reads back to the same bits."""
        return {"columns": list(self.columns), "mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Sequence[object]]) -> StandardScaler:
        """Read back what `to_json` wrote.

        Raises:
            DataError: Keys or lengths are wrong, or a number is not finite or a scale not positive.
        """
        columns, mean, scale = _read(saved, ("columns", "mean", "scale"))
        if not mean.shape == scale.shape == (len(columns),):
            raise DataError("a scaler's columns, mean and scale must be of one length")
        return cls(columns, mean, scale)


def _read(
    saved: Mapping[str, Sequence[object]], keys: tuple[str, ...]
) -> tuple[tuple[str, ...], Floats, Floats]:
    """Read the columns and the numbers of a scaler."""
    if set(saved) != set(keys):
        wanted = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise DataError(f"a scaler has {wanted}, not {', '.join(sorted(saved)) or 'nothing'}")
    try:
        mean, scale = (np.asarray(saved[key], dtype=np.float64) for key in ("mean", "scale"))
    except (TypeError, ValueError):
        raise DataError("a scaler's mean and scale must be numbers") from None
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise DataError("a scaler's numbers must be finite and its scales positive")
    return tuple(str(name) for name in saved["columns"]), mean, scale


@dataclass(frozen=True)
class SeriesScaler:
    """Mean and scale a series and column, in float64.

    Args:
        ids: The series, each with its number.
        columns: The columns.
        mean: Their means.
        scale: Their scales.

    Shape:
        mean and scale `[S, N]`.
    """

    ids: Mapping[str, int]
    columns: tuple[str, ...]
    mean: Floats = field(repr=False)
    scale: Floats = field(repr=False)

    @classmethod
    def fit(cls, tables: Mapping[str, Floats], columns: Sequence[str]) -> SeriesScaler:
        """Fit each series on its own train rows.

        Args:
            tables: The train rows by series.
            columns: The columns' names.

        Raises:
            DataError: A column of a series has no observed value in its train rows.
        """
        mean, scale = np.zeros((2, len(tables), len(columns)))
        for i, (ident, table) in enumerate(tables.items()):
            count, mean[i], squares = _moments(table)
            if not count.all():
                column = columns[int(count.argmin())]
                raise DataError(f"series {ident!r}: column {column!r} has no value in the train rows")
            scale[i] = _scale(count, mean[i], squares)
        return cls({ident: i for i, ident in enumerate(tables)}, tuple(columns), mean, scale)

    def of(self, ident: str) -> StandardScaler | None:
        """Return the scaler of a series, or None where the train data had not got it."""
        i = self.ids.get(ident)
        return None if i is None else StandardScaler(self.columns, self.mean[i], self.scale[i])

    def to_json(self) -> dict[str, object]:
        """Return plain lists; a float's JSON text reads back to the same bits."""
        return {
            "ids": list(self.ids),
            "columns": list(self.columns),
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Sequence[object]]) -> SeriesScaler:
        """Read back what `to_json` wrote.

        Raises:
            DataError: Keys or lengths are wrong, or a number is not finite or a scale not positive.
        """
        columns, mean, scale = _read(saved, ("ids", "columns", "mean", "scale"))
        ids = {str(ident): i for i, ident in enumerate(saved["ids"])}
        if not mean.shape == scale.shape == (len(ids), len(columns)) or len(ids) != len(saved["ids"]):
            raise DataError("a series scaler has one mean and scale a series and column")
        return cls(ids, columns, mean, scale)
