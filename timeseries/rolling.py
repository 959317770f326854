"""Conformal intervals in a backtest: calibrated on the windows before, fixed or moving with the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.timeseries.backtest import Answer, RollingModel
from manyheads.timeseries.conformal import Floats, RollingConformal, SplitConformal, interval_levels, spacing
from manyheads.timeseries.treatment import Range
from manyheads.timeseries.windows import Windows


class Intervals(Protocol):
    """Puts quantiles around point forecasts; its answers come series by series in the order of time."""

    def around(self, answer: Answer) -> Tensor:
        """Return the quantiles `[B, P, N, Q]` of a batch, in the data's own units."""


def coverages_of(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the coverages of the central intervals that levels are the ends of, rising.

    Raises:
        UsageError: A level has no other end.

    Example:
        >>> coverages_of([0.05, 0.1, 0.9, 0.95])
        (0.8, 0.9)
    """
    found = sorted({round(abs(2 * level - 1), 9) for level in levels})
    lacking = sorted(set(interval_levels(found)) - {round(level, 10) for level in levels})
    if lacking or 0.0 in found:
        end = 0.5 if 0.0 in found else round(1 - lacking[0], 9)
        other = "is the point forecast itself: leave it out" if end == 0.5 else f"needs {lacking[0]} too"
        raise UsageError(f"conformal intervals have two ends: level {end} {other}")
    return tuple(found)


def errors_of(
    tester: RollingModel, windows: Windows, indices: NDArray[np.integer], size: int
) -> tuple[Floats, Floats]:
    """Return the absolute errors of some windows, in own and in the model's units.

    Shape:
        Each `[W, P, N]`.
    """
    shape = (0, windows.pred_len, windows.n_values)
    own, scaled = [np.zeros(shape)], [np.zeros(shape)]
    for first in range(0, len(indices), size):
        answer = tester.ask(windows, indices[first : first + size])
        error = (answer.y - answer.point).abs()
        own.append(error.numpy())
        scaled.append((error / answer.scale).numpy())
    return np.concatenate(own), np.concatenate(scaled)


class Fixed:
    """Split conformal intervals.

    Args:
        conformal: The intervals, in the model's units.
        columns: The variates.
        levels: Those of their ends that are wanted.
    """

    def __init__(self, conformal: SplitConformal, columns: Sequence[str], levels: Sequence[float]) -> None:
        self.conformal, self.columns, self.levels = conformal, columns, levels

    @classmethod
    def fit(
        cls,
        tester: RollingModel,
        ranges: Sequence[Range],
        columns: Sequence[str],
        levels: Sequence[float],
        size: int,
    ) -> Fixed:
        """Calibrate on the windows of some rows of all series together, of many on every k-th.

        Raises:
            UsageError: A level has no other end.
            DataError: There are too few windows.
        """
        windows = tester.windows(ranges)
        every = spacing(len(windows), windows.pred_len * windows.n_values)
        _, errors = errors_of(tester, windows, np.arange(0, len(windows), every), size)
        return cls(SplitConformal.fit(errors, coverages_of(levels), columns), columns, levels)

    def around(self, answer: Answer) -> Tensor:
        """Put the ends around."""
        ends = self.conformal.apply(answer.point / answer.scale, self.levels, self.columns)
        return ends * answer.scale[..., None]


class Rolling:
    """Rolling conformal intervals, of each series for itself.

    Args:
        tester: Forecasts the windows to begin with.
        ranges: Their rows.
        levels: Levels of the ends.
        step: Rows from a window to the next.
        size: Windows a batch.

    Raises:
        UsageError: A level has no other end.
    """

    def __init__(
        self, tester: RollingModel, ranges: Sequence[Range], levels: Sequence[float], step: int, size: int
    ) -> None:
        self._tester, self._windows, self._step, self._size = tester, tester.windows(ranges), step, size
        length = tester.of.seq_len + tester.of.pred_len
        self._ends = np.cumsum([0, *(max(0, end - first - length + 1) for first, end in ranges)])
        self._coverages = coverages_of(levels)
        self._states: dict[int, RollingConformal] = {}

    def _state(self, series: int) -> RollingConformal:
        if series not in self._states:
            own = np.arange(self._ends[series], self._ends[series + 1])
            errors, _ = errors_of(self._tester, self._windows, own, self._size)
            self._states[series] = RollingConformal(errors, self._coverages, self._step)
        return self._states[series]

    def around(self, answer: Answer) -> Tensor:
        """Put the ends around one window after the other, and learn from each whose truth has come."""
        made = []
        errors = (answer.y - answer.point).abs().numpy()
        for point, error, series in zip(answer.point.numpy(), errors, answer.series.tolist(), strict=True):
            state = self._state(series)
            made.append(state.apply(point))
            state.add(error)
        return torch.from_numpy(np.stack(made))
