"""Tables to windows of train, validation and test rows, treated by the train rows; and the labels, if any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import DataError, did_you_mean
from manyheads.core.tables import column_names
from manyheads.timeseries.data import Split, split_rows
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.layout import find_layout
from manyheads.timeseries.tables import Coded, Missing
from manyheads.timeseries.treatment import Treatment, fit_treatment, lay_out
from manyheads.timeseries.windows import Batch, Windows

Scaling = Literal["global", "series"]
_LABELS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


class Names(TypedDict, total=False):
    """Which columns are what, as the caller names them.

    Args:
        time_column: Name of the time column, if not a usual one.
        id_column: Name of a long table's id column, if not a usual one.
        targets: Columns to rebuild; without it a wide table's columns, or `y`.
    """

    time_column: str | None
    id_column: str | None
    targets: list[str] | None


class ScoredBatch(Batch):
    """A batch of windows whose rows are scored."""

    fresh: Tensor  # [B, L] bool: no window before has the row
    label: Tensor  # [B, L] 1 for an anomaly, 0 for none, NaN where nobody says


@dataclass(frozen=True)
class Parts:
    """Windows of the parts, the treatment fitted on the train rows, and the rows' labels where there are any.

    Shape:
        labels `[R]`, NaN where nobody says.
    """

    columns: tuple[str, ...]
    freq: str
    treatment: Treatment
    train: Windows
    val: Windows
    test: Windows
    labels: Tensor


def read_parts(
    path: Path,
    split: Split,
    seq_len: int,
    lookback: int,
    freq: str | None,
    missing: Missing,
    scaling: Scaling,
    named: Names,
    label: str | None = None,
) -> Parts:
    """Read, check, split and scale.

    Args:
        path: The file.
        split: Where the parts begin.
        seq_len: Steps of a window.
        lookback: Rows of the part before that a validation or test part begins with.
        freq: Frequency of the timestamps; None infers it.
        missing: "refuse" or "mask" missing values.
        scaling: By all train rows, or each series by its own.
        named: Which columns are what.
        label: The column of labels.

    Raises:
        DataError: What is wrong with the data.
    """
    if label and label not in (names := column_names(path)):
        hint = did_you_mean(label, names)
        raise DataError(f"{path}: no label column {label!r}{hint} (columns: {', '.join(names)})")
    past = [label] if label else []
    series = read(path, freq=freq, missing=missing, past=past, categorical=past, **named)
    layout = find_layout(column_names(path), str(path), **named, past=past)
    ranges = [_ranges(each, split, seq_len, lookback) for each in series]
    labels = [_labels(each, label) for each in series]
    bare = [Series(s.id, s.ds, s.values, s.columns, s.freq) for s in series]
    layout = find_layout(
        [layout.time, *([layout.id] if layout.id else []), *layout.targets], str(path), **named
    )
    by: Scaling = "global" if layout.id is None else scaling  # a wide table is one series
    treatment = fit_treatment(bare, [part[0] for part in ranges], layout, by, "refuse")
    table = lay_out(bare, treatment)
    train, val, test = (
        Windows(table.rows, len(series[0].columns), rows, seq_len, 0, masked=True)
        for rows in (
            [(a + at, b + at) for at, (a, b) in zip(table.offsets, part, strict=True)]
            for part in zip(*ranges, strict=True)
        )
    )
    return Parts(series[0].columns, series[0].freq, treatment, train, val, test, torch.cat(labels))


def _ranges(series: Series, split: Split, seq_len: int, lookback: int) -> Sequence[tuple[int, int]]:
    """Split one series, each part with one window at least."""
    try:
        ranges = split_rows(len(series.ds), split, lookback)
    except DataError as error:
        raise DataError(f"series {series.id!r} has {error}") from None
    for part, (first, end) in zip(("train", "validation", "test"), ranges, strict=True):
        if first < 0 or end - first < seq_len:
            raise DataError(
                f"series {series.id!r} of {len(series.ds)} rows is too short: the {part} part has no window "
                f"of {seq_len} rows; shorten seq_len, or leave the series out"
            )
    return ranges


def _labels(series: Series, column: str | None) -> Tensor:
    """Return the labels of a series' rows.

    Raises:
        DataError: One is neither 0 nor 1.
    """
    if column is None:
        return torch.full((len(series.ds),), float("nan"))
    cells = series.covariates[column]
    assert isinstance(cells, Coded)
    codes = np.array([_LABELS.get(text.lower(), -1.0) for text in cells.values] + [np.nan])  # the last: empty
    made = codes[cells.codes]
    wrong = np.flatnonzero(made < 0)
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"series {series.id!r} at {series.ds[i].item()}, column {column!r}: "
            f"{cells.values[cells.codes[i]]!r} is no label; 1 is an anomaly, 0 is none"
        )
    return torch.from_numpy(made).float()


class Tiles:
    """Windows side by side over each range; the last one of a range ends with it, and may overlap.

    Args:
        windows: All windows.
        labels: The rows' labels.
    """

    def __init__(self, windows: Windows, labels: Tensor) -> None:
        self.windows, self.labels = windows, labels
        index = np.arange(len(windows))
        series, starts = windows.locate(index)
        first = np.concatenate([[True], series[1:] != series[:-1]])
        last = np.concatenate([first[1:], [True]])
        begins = starts[first][np.cumsum(first) - 1]
        into, length = starts - begins, windows.seq_len
        self._index = index[(into % length == 0) | last]
        new = np.where(into % length == 0, length, into % length)
        self._new = torch.from_numpy(new[self._index])

    def __len__(self) -> int:
        return len(self._index)

    def gather(self, indices: NDArray[np.integer]) -> ScoredBatch:
        """Return some of the windows."""
        at, steps = self._index[indices], np.arange(self.windows.seq_len)
        rows = torch.from_numpy(self.windows.locate(at)[1][:, None] + steps)
        old = self.windows.seq_len - self._new[torch.from_numpy(np.asarray(indices, np.int64))]
        fresh = torch.from_numpy(steps) >= old[:, None]
        return {**self.windows.gather(at), "fresh": fresh, "label": self.labels[rows]}
