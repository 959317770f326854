"""Standardisation per column, fitted on the train rows only, saved with the model to the last bit.

Source: the published protocol scales each variate by the train rows' mean and population deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

Floats = NDArray[np.float64]


def _deviation(values: Floats, mean: Floats) -> Floats:
    """Population deviation of the observed rows; 1 where a column is constant, so that it becomes 0."""
    there = ~np.isnan(values)
    count = np.maximum(there.sum(axis=0), 1)
    deviation = np.sqrt(np.square(np.where(there, values - mean, 0.0)).sum(axis=0) / count)
    # Rounding alone gives a constant column of size m a deviation of some 1e-16 m.
    return np.where(deviation <= 1e-12 * np.abs(mean), 1.0, deviation)


def window_statistics(values: Floats) -> tuple[Floats, Floats]:
    """Return the mean and deviation of each column of one context window; 0 and 1 where nothing is observed.

    Shape:
        values `[L, N]`; returns `[N]` and `[N]`.
    """
    there = ~np.isnan(values)
    mean = np.where(there, values, 0.0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return mean, _deviation(values, mean)


@dataclass(frozen=True)
class StandardScaler:
    """Mean and scale a column, in float64.

    A constant column has scale 1: it becomes 0 on the train rows, and keeps its own unit elsewhere.
    """

    columns: tuple[str, ...]
    mean: Floats = field(repr=False)
    scale: Floats = field(repr=False)

    @classmethod
    def fit(cls, tables: Sequence[Floats], columns: Sequence[str]) -> StandardScaler:
        """Fit on the train rows, pooled over the series; missing values do not count.

        Args:
            tables: One array of train rows a series.
            columns: The columns' names.

        Shape:
            Each table `[T, N]`.

        Raises:
            DataError: A column has no observed value in the train rows.
        """
        values = np.concatenate(tables)
        empty = np.isnan(values).all(axis=0)
        if empty.any():
            raise DataError(
                f"column {columns[int(empty.argmax())]!r} has no value in the train rows; leave it out"
            )
        return cls(tuple(columns), *window_statistics(values))

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
        if set(saved) != {"columns", "mean", "scale"}:
            raise DataError(
                f"a scaler has columns, mean and scale, not {', '.join(sorted(saved)) or 'nothing'}"
            )
        columns = tuple(str(name) for name in saved["columns"])
        try:
            mean, scale = (np.asarray(saved[key], dtype=np.float64) for key in ("mean", "scale"))
        except (TypeError, ValueError):
            raise DataError("a scaler's mean and scale must be numbers") from None
        if not mean.shape == scale.shape == (len(columns),):
            raise DataError("a scaler's columns, mean and scale must be of one length")
        if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise DataError("a scaler's numbers must be finite and its scales positive")
        return cls(columns, mean, scale)
