"""Intervals around any point forecast, as wide as its errors were on windows that it was not trained on.

Split conformal prediction (arXiv 1604.04173) fixes the width once, for each step and variate, by the
finite-sample quantile of the validation windows' absolute errors. Its coverage holds where later windows are
like those; where they drift, the rolling form forgets old errors and moves its level as the truth arrives
(arXiv 2106.00170).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calls import check_levels

Floats = NDArray[np.float64]

_MOST_ERRORS = 20_000_000  # that intervals are made of


def interval_levels(coverages: Sequence[float]) -> tuple[float, ...]:
    """Return the levels of the ends of central intervals, rising.

    Example:
        >>> interval_levels([0.8, 0.9])
        (0.05, 0.1, 0.9, 0.95)
    """
    upper = [round((1 + coverage) / 2, 10) for coverage in sorted(coverages)]
    return (*(round(1 - level, 10) for level in reversed(upper)), *upper)


def spacing(windows: int, cells: int) -> int:
    """Return k, where the errors of every k-th window are as many as intervals need at most.

    Args:
        windows: How many windows there are.
        cells: Errors of one.
    """
    return max(1, -(-windows * cells // _MOST_ERRORS))


@dataclass(frozen=True)
class SplitConformal:
    """How far to each side of a point forecast an interval reaches, in the units of the model's batches.

    Args:
        columns: The variates.
        coverages: Shares of the truth that the intervals shall hold, rising.
        radius: How far each reaches.

    Shape:
        radius `[C, P, N]`.
    """

    columns: tuple[str, ...]
    coverages: tuple[float, ...]
    radius: Floats = field(repr=False)

    @classmethod
    def fit(cls, errors: Floats, coverages: Sequence[float], columns: Sequence[str]) -> SplitConformal:
        """Take the quantiles of errors: of n, the ceil((n + 1) * coverage)-th smallest.

        Args:
            errors: Absolute errors of forecasts that the model was not trained on; NaN where unknown.

        Shape:
            errors `[W, P, N]`.

        Raises:
            UsageError: The coverages do not rise or do not lie in (0, 1).
            DataError: There are too few errors for a coverage.
        """
        check_levels(coverages, "conformal")
        ordered = np.sort(errors, axis=0)  # NaN last
        count = (~np.isnan(errors)).sum(axis=0)  # [P, N]
        radius = []
        for coverage in coverages:
            rank = np.ceil((count + 1) * coverage - 1e-9).astype(int)
            if (rank > count).any():
                step, variate = np.argwhere(rank > count)[0]
                needed = math.ceil(coverage / (1 - coverage) - 1e-9)
                raise DataError(
                    f"a coverage of {coverage} needs {needed} validation windows; step {step + 1} of column "
                    f"{columns[variate]!r} has {count[step, variate]}"
                )
            radius.append(np.take_along_axis(ordered, rank[None] - 1, axis=0)[0])
        return cls(tuple(columns), tuple(coverages), np.stack(radius))

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of the intervals' ends, as quantiles."""
        return interval_levels(self.coverages)

    def apply(self, point: Tensor, levels: Sequence[float], columns: Sequence[str]) -> Tensor:
        """Return the ends of the intervals around point forecasts.

        Args:
            point: Forecasts in the units of the model's batches.
            levels: Some of `levels`.
            columns: The forecasts' variates.

        Shape:
            point `[..., P, N]` -> `[..., P, N, Q]`.

        Raises:
            UsageError: A level that there is not.
            DataError: A column that the intervals were not made for.
        """
        unknown = [name for name in columns if name not in self.columns]
        if unknown:
            known = ", ".join(self.columns)
            raise DataError(f"no conformal interval for column {unknown[0]!r}: they were made for {known}")
        places = [self.columns.index(name) for name in columns]
        offsets = [self._offset(level)[:, places] for level in levels]  # [P, N] each
        shift = torch.from_numpy(np.stack(offsets, axis=-1)).to(point)  # [P, N, Q]
        return point[..., None] + shift

    def _offset(self, level: float) -> Floats:
        if level not in self.levels:
            raise UsageError(f"no quantile {level}: the model has {', '.join(map(str, self.levels))}")
        place = self.levels.index(level) - len(self.coverages)
        return self.radius[place] if place >= 0 else -self.radius[-place - 1]

    def to_json(self) -> dict[str, object]:
        """Return plain JSON."""
        radius = self.radius.tolist()
        return {"columns": list(self.columns), "coverages": list(self.coverages), "radius": radius}

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> SplitConformal:
        """Read back what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        wrong = DataError("the model's conformal intervals must have columns, coverages and a finite radius")
        if set(saved) != {"columns", "coverages", "radius"}:
            raise wrong
        columns, coverages = saved["columns"], saved["coverages"]
        try:
            radius = np.asarray(saved["radius"], dtype=np.float64)
            check_levels(coverages, "conformal")  # type: ignore[arg-type]
        except (TypeError, ValueError, UsageError):
            raise wrong from None
        if not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
            raise wrong
        made = cls(tuple(columns), tuple(coverages), radius)  # type: ignore[arg-type]
        shape = (len(made.coverages), len(made.columns))
        if radius.ndim != 3 or (len(radius), radius.shape[2]) != shape or not np.isfinite(radius).all():
            raise wrong
        return made


class RollingConformal:
    """Intervals around one series' forecasts, one after the other in time.

    The errors that it compares with are the last ones known, and the level at which it takes their quantile
    rises or falls with each error outside or inside. An error at step h is used once h rows have passed.

    Args:
        errors: Absolute errors to begin with, the oldest first, one row apart; NaN where unknown.
        coverages: Shares of the truth that the intervals shall hold, rising.
        step: Rows from a forecast to the next.
        keep: Errors to remember for each step and variate.
        rate: How fast levels move: by this share of the error a forecast, divided by the forecasts that pass
            until an error is known, in which a faster level would overshoot.

    Shape:
        errors `[W, P, N]`.

    Raises:
        UsageError: The coverages do not rise or do not lie in (0, 1).
        DataError: There are no errors to begin with.

    Example:
        >>> rolling = RollingConformal(validation_errors, [0.9], step=24)
        >>> for point, y in windows:
        ...     lower, upper = point - rolling.radius()[0], point + rolling.radius()[0]
        ...     rolling.add(abs(y - point))
    """

    def __init__(
        self,
        errors: Floats,
        coverages: Sequence[float],
        step: int = 1,
        keep: int = 500,
        rate: float = 0.05,
    ) -> None:
        check_levels(coverages, "conformal")
        if not errors.size:
            raise DataError("rolling intervals need errors of earlier forecasts to begin with")
        self.coverages, self._shape = tuple(coverages), errors.shape[1:]
        steps, variates = self._shape
        chosen = errors[::-1][::step][:keep][::-1].reshape(-1, steps * variates)
        self._ring = np.where(np.isnan(chosen), np.inf, chosen).T.copy()  # [P * N, K], inf where unknown
        self._sorted = np.sort(self._ring, axis=1)
        self._oldest = np.zeros(steps * variates, dtype=int)  # where the ring goes on, for each cell
        target = 1 - np.asarray(coverages, dtype=np.float64)[:, None]  # [C, 1]
        self._target, self._alpha = target, np.repeat(target, steps * variates, axis=1)
        # After so many further forecasts the truth of a step is known.
        self._delay = np.repeat(-(-np.arange(1, steps + 1) // step), variates)
        self._rate = rate / self._delay
        self._pending: list[tuple[Floats, NDArray[np.bool_]]] = []

    def radius(self) -> Floats:
        """Return how far the next forecast's intervals reach.

        Shape:
            `[C, P, N]`; infinite where no error is known.
        """
        count = np.isfinite(self._sorted).sum(axis=1)  # [P * N]
        rank = np.ceil((count + 1) * (1 - self._alpha) - 1e-9).astype(int)
        rank = np.clip(rank, 1, np.maximum(count, 1))  # [C, P * N]
        return np.take_along_axis(self._sorted, rank.T - 1, axis=1).T.reshape(-1, *self._shape)

    def apply(self, point: Floats) -> Floats:
        """Return the ends of the next forecast's intervals, in the order of `interval_levels`.

        Shape:
            point `[P, N]` -> `[P, N, 2 C]`.
        """
        radius = self.radius()
        return np.moveaxis(np.concatenate([point - radius[::-1], point + radius]), 0, -1)

    def add(self, errors: Floats) -> None:
        """Go on to the next forecast, after one whose errors will be these.

        Args:
            errors: Absolute errors; each is used when its truth is known. NaN where unknown.

        Shape:
            errors `[P, N]`.
        """
        flat = errors.reshape(-1)
        outside = flat > self.radius().reshape(len(self.coverages), -1)  # [C, P * N]
        self._pending.append((flat, outside))
        self._pending = self._pending[-int(self._delay.max()) :]
        row = len(self._pending) - self._delay  # of the forecast whose truth is known now, for each cell
        cells = np.flatnonzero(row >= 0)
        known = np.stack([each for each, _ in self._pending])[row[cells], cells]
        cells, known = cells[~np.isnan(known)], known[~np.isnan(known)]
        missed = np.stack([each for _, each in self._pending])[row[cells], :, cells].T  # [C, cells]
        self._alpha[:, cells] += self._rate[cells] * (self._target - missed)
        self._remember(cells, known)

    def _remember(self, cells: NDArray[np.intp], errors: Floats) -> None:
        """Let new errors of some cells take the place of their oldest."""
        oldest = self._ring[cells, self._oldest[cells]]
        self._sorted[cells] = _replaced(self._sorted[cells], oldest, errors)
        self._ring[cells, self._oldest[cells]] = errors
        self._oldest[cells] = (self._oldest[cells] + 1) % self._ring.shape[1]


def _replaced(rows: Floats, old: Floats, new: Floats) -> Floats:
    """Take one value out of each sorted row and put another in, so that it stays sorted.

    Shape:
        rows `[R, K]`, old, new `[R]` -> `[R, K]`.
    """
    gone = (rows < old[:, None]).sum(axis=1)
    to = (rows < new[:, None]).sum(axis=1) - (old < new)
    place, gone, to = np.arange(rows.shape[1]), gone[:, None], to[:, None]
    left, right = (place >= gone) & (place < to), (place > to) & (place <= gone)
    rows = np.take_along_axis(rows, place + left.astype(int) - right.astype(int), axis=1)
    np.put_along_axis(rows, to, new[:, None], axis=1)
    return rows
