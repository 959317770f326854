"""From a data set or a file to windows that are rebuilt from themselves, with hidden cells or with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.data import Split, find_source, split_rows
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.layout import find_layout
from manyheads.timeseries.readers import column_names
from manyheads.timeseries.reconstruction.masks import Masked, MaskedBatch
from manyheads.timeseries.tables import Coded, Missing
from manyheads.timeseries.treatment import Treatment, fit_treatment, lay_out
from manyheads.timeseries.windows import Batch, WindowLoader, Windows

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


def _saved(
    parts: Parts, seq_len: int, missing: Missing, named: Names, targets: list[str] | None
) -> dict[str, object]:
    """Return what a predictor needs; its outputs are as long as its inputs."""
    return {
        "seq_len": seq_len,
        "pred_len": seq_len,
        "columns": list(parts.columns),
        "targets": targets,
        "time_column": named.get("time_column"),
        "id_column": named.get("id_column"),
        "freq": parts.freq,
        "missing": missing,
        "time_features": list(feature_names(parts.freq)),
        **parts.treatment.to_json(),
    }


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 2 or batch_size < 1:
        raise UsageError(
            f"seq_len must be 2 or more and batch_size 1 or more, not {seq_len} and {batch_size}"
        )


class ImputationData(LightningDataModule):
    """Windows of a data set or a file with cells hidden at random; missing values are left out everywhere.

    Validation and test hide the same cells each time, whatever the batches; training hides new ones.

    Args:
        dataset: Name of a data set, or path of a CSV or parquet file, long or wide.
        seq_len: Steps of a window.
        batch_size: Windows a batch.
        mask_ratio: Expected share of the cells to hide, between 0 and 1.
        gap: Steps of a run of hidden cells of one column; 1 hides each cell by itself.
        split: Where the parts begin; None takes the data set's own, and "ratio" for a file.
        freq: Frequency of the timestamps; None infers it.
        scaling: By all train rows ("global"), or each series by its own ("series").
        seed: Seed of the train order and of the hidden cells.
        named: Which columns are what.
    """

    def __init__(
        self,
        dataset: str = "etth1",
        seq_len: int = 96,
        batch_size: int = 16,
        mask_ratio: float = 0.25,
        gap: int = 1,
        split: Split | None = None,
        freq: str | None = None,
        scaling: Scaling = "global",
        seed: int = 0,
        **named: Unpack[Names],
    ) -> None:
        super().__init__()
        _check_sizes(seq_len, batch_size)
        if not 0 < mask_ratio < 1:
            raise UsageError(f"mask_ratio must lie between 0 and 1, not {mask_ratio}")
        if not 1 <= gap < seq_len:
            raise UsageError(f"gap must be 1 or more and shorter than the window of {seq_len}, not {gap}")
        self.dataset, self.seq_len, self.batch_size, self.split = dataset, seq_len, batch_size, split
        self.mask_ratio, self.gap, self.seed, self.named = mask_ratio, gap, seed, named
        self.freq, self.scaling = freq, scaling
        self._parts: Parts | None = None

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return find_source(self.dataset, self.split)[0]

    @property
    def parts(self) -> Parts:
        """The windows and their treatment; read once."""
        if self._parts is None:
            path, split = find_source(self.dataset, self.split)
            self._parts = read_parts(
                path, split, self.seq_len, self.seq_len, self.freq, "mask", self.scaling, self.named
            )
        return self._parts

    @property
    def channels(self) -> int:
        """Values a step."""
        return len(self.parts.columns)

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        assert self.parts

    def _masked(self, windows: Windows, seed: int | None) -> Masked:
        return Masked(windows, self.mask_ratio, self.gap, seed)

    def train_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return the train batches, in a new order each epoch."""
        part = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        windows = self._masked(self.parts.train, None)
        return WindowLoader(windows, self.batch_size, True, False, self.seed, part)

    def val_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return all validation batches."""
        return WindowLoader(self._masked(self.parts.val, self.seed), self.batch_size)

    def test_dataloader(self) -> WindowLoader[MaskedBatch]:
        """Return all test batches."""
        return WindowLoader(self._masked(self.parts.test, self.seed), self.batch_size)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        return _saved(self.parts, self.seq_len, "mask", self.named, self.named.get("targets"))


class DetectionData(LightningDataModule):
    """Windows of a data set or a file; validation and test go once over each row.

    Args:
        dataset: Name of a data set, or path of a CSV or parquet file, long or wide.
        seq_len: Steps of a window.
        batch_size: Windows a batch.
        label_column: Column that is 1 in a row with an anomaly, else 0, to test by; nothing learns from it.
        split: Where the parts begin; None takes the data set's own, and "ratio" for a file.
        freq: Frequency of the timestamps; None infers it.
        scaling: By all train rows ("global"), or each series by its own ("series").
        missing: "refuse" missing values, or "mask" them: they are not scored.
        seed: Seed of the train order.
        named: Which columns are what.
    """

    def __init__(
        self,
        dataset: str = "etth1",
        seq_len: int = 96,
        batch_size: int = 32,
        label_column: str | None = None,
        split: Split | None = None,
        freq: str | None = None,
        scaling: Scaling = "global",
        missing: Missing = "refuse",
        seed: int = 0,
        **named: Unpack[Names],
    ) -> None:
        super().__init__()
        _check_sizes(seq_len, batch_size)
        self.dataset, self.seq_len, self.batch_size, self.split = dataset, seq_len, batch_size, split
        self.label_column, self.seed, self.named = label_column, seed, named
        self.freq, self.scaling, self.missing = freq, scaling, missing
        self._parts: Parts | None = None

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return find_source(self.dataset, self.split)[0]

    @property
    def parts(self) -> Parts:
        """The windows and their treatment; read once."""
        if self._parts is None:
            path, split = find_source(self.dataset, self.split)
            self._parts = read_parts(
                path,
                split,
                self.seq_len,
                0,
                self.freq,
                self.missing,
                self.scaling,
                self.named,
                self.label_column,
            )
        return self._parts

    @property
    def channels(self) -> int:
        """Values a step."""
        return len(self.parts.columns)

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        assert self.parts

    def train_dataloader(self) -> WindowLoader[Batch]:
        """Return the train batches, in a new order each epoch."""
        part = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return WindowLoader(self.parts.train, self.batch_size, True, False, self.seed, part)

    def val_dataloader(self) -> WindowLoader[ScoredBatch]:
        """Return the validation rows, each once."""
        return WindowLoader(Tiles(self.parts.val, self.parts.labels), self.batch_size)

    def test_dataloader(self) -> WindowLoader[ScoredBatch]:
        """Return the test rows, each once."""
        return WindowLoader(Tiles(self.parts.test, self.parts.labels), self.batch_size)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        named = list(self.parts.columns) if self.label_column else self.named.get("targets")
        return _saved(self.parts, self.seq_len, self.missing, self.named, named)
