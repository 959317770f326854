"""Forecasts of new series: tables in, rows out. Torch only, no lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.timeseries import sources
from manyheads.timeseries.calendar import Times, future, time_features
from manyheads.timeseries.frames import check_missing
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.readers import stem_of
from manyheads.timeseries.sources import File, Run
from manyheads.timeseries.windows import fill_gaps

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

Row = core.Row


@dataclass(frozen=True)
class Shard:
    """Some records of one source, by their places; each run goes with the number of its file."""

    files: tuple[File, ...]
    runs: tuple[tuple[int, Run], ...]


@dataclass(frozen=True)
class Record:
    """One series, or the columns forecast jointly, as far as the model needs it.

    Args:
        id: The series' id, or a wide file's name.
        names: The `unique_id` of each column's rows.
        file: Where it was read.
        tail: The last rows, or what is wrong with them.
    """

    id: str
    names: tuple[str, ...]
    file: File
    tail: sources.Tail | DataError


@dataclass(frozen=True)
class Sample:
    """A record ready for the model.

    Shape:
        x `[L, N]` scaled, x_mark `[L, M]`, y_mark `[P, M]`, mean and scale `[N]`, ds `[P]` to forecast.
    """

    x: Tensor
    x_mark: Tensor
    y_mark: Tensor
    mean: Tensor
    scale: Tensor
    ds: Times


@dataclass(frozen=True)
class Group:
    """Samples of one number of columns, stacked, and their positions in the batch."""

    positions: tuple[int, ...]
    x: Tensor  # [B, L, N]
    x_mark: Tensor  # [B, L, M]
    y_mark: Tensor  # [B, P, M]
    mean: Tensor  # [B, 1, N]
    scale: Tensor  # [B, 1, N]
    ds: tuple[Times, ...]


@dataclass(frozen=True)
class Forecast:
    """One record's forecast in its own units.

    Shape:
        ds `[P]`, values `[P, N]`.
    """

    ds: Times
    values: NDArray[np.float64]


class Predictor:
    """Forecasts series of CSV or parquet files, or of a DataFrame; long, wide or panel.

    Args:
        model: Takes `x [B, L, N], x_mark [B, L, M], y_mark [B, P, M]`, returns `[B, P, N]`.
        preprocessing: How the train data were treated.
    """

    batch_size = 64

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of a row and their Arrow types."""
        return {"unique_id": "string", "ds": "timestamp[us]", "yhat": "double"}

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing is not what `ForecastData` writes.
        """
        return cls(model, Preprocessing.from_json(config.preprocessing))

    def predict(self, source: core.Source) -> pd.DataFrame:
        """Forecast a whole source in memory.

        Raises:
            DataError: What is wrong with the source or a record.

        Example:
            >>> manyheads.load("quickstart/model").predict("file.csv")
        """
        return core.predict(self, source)

    def _files(self, source: core.Source) -> list[File]:
        import pandas as pd

        named = self.preprocessing.named
        if isinstance(source, pd.DataFrame):
            return [sources.open_frame(source, **named)]
        if isinstance(source, str | Path):
            return [sources.open_file(Path(source), **named)]
        if not isinstance(source, Sequence) or not all(isinstance(each, str | Path) for each in source):
            raise UsageError("a source is a CSV or parquet path, a list of such paths, or a DataFrame")
        paths = [Path(each) for each in source]
        stems: dict[str, Path] = {}
        for path in paths:
            stem = stem_of(path)
            if stem in stems:
                raise UsageError(
                    f"{stems[stem]} and {path} have one name, so ids would not differ; rename one"
                )
            stems[stem] = path
        prefixes = [f"{stem}/" if len(paths) > 1 else "" for stem in stems]
        return [
            sources.open_file(path, prefix, **named) for path, prefix in zip(paths, prefixes, strict=True)
        ]

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` records, in order.

        A long file's ids are read once, to find where each series lies; its rows must stand together. A gzip
        CSV has no places to go to: each shard decompresses what lies before it; parquet serves large files.

        Args:
            source: Path of a CSV or parquet file, several paths, or a DataFrame.
            size: Records a shard.

        Raises:
            DataError: A file or its columns cannot be used, or a series stands in two places.
        """
        files = tuple(self._files(source))
        runs = [(i, run) for i, file in enumerate(files) for run in sources.index(file)]
        return [self._shard(files, runs[i : i + size]) for i in range(0, len(runs), size)]

    @staticmethod
    def _shard(files: Sequence[File], runs: Sequence[tuple[int, Run]]) -> Shard:
        """Make a shard that holds its own files alone, for it is sent to worker processes."""
        number = {i: k for k, i in enumerate(dict.fromkeys(i for i, _ in runs))}
        return Shard(tuple(files[i] for i in number), tuple((number[i], run) for i, run in runs))

    def read(self, shard: Shard) -> Iterator[Record]:
        """Stream a shard's records, each with the rows that the model needs."""
        of = self.preprocessing
        for i, places in groupby(shard.runs, key=lambda place: place[0]):
            file = shard.files[i]
            runs = [run for _, run in places]
            for run, tail in sources.read_runs(file, runs, of.seq_len, of.freq):
                name = f"{file.prefix}{run.id}" if file.layout.id else run.id
                yield Record(name, self._names(file, name), file, tail)

    @staticmethod
    def _names(file: File, name: str) -> tuple[str, ...]:
        """Return the unique_id of each target's rows."""
        targets = file.layout.targets
        if file.layout.id is None:
            return tuple(f"{file.prefix}{target}" for target in targets)
        return (name,) if len(targets) == 1 else tuple(f"{name}/{target}" for target in targets)

    def prepare(self, record: Record) -> Sample:
        """Check and scale a record's context window.

        Raises:
            BadRecord: Too short, a value missing, a cell that is no number, timestamps out of order or of
                another frequency (names the row), or not the columns that the model is built for.
        """
        of, tail, targets = self.preprocessing, record.tail, record.file.layout.targets
        if isinstance(tail, DataError):
            raise BadRecord(str(tail))
        if tail.rows < of.seq_len:
            raise BadRecord(f"{record.file.name}: too short, {tail.rows} rows; the model needs {of.seq_len}")
        self._check_columns(record)
        self._check_missing(record, tail)
        mean, scale = of.scaler.for_columns(targets, tail.values)
        scaled = torch.from_numpy((tail.values - mean) / scale).float()
        ahead = future(tail.ds[-1], of.pred_len, of.freq)
        return Sample(
            fill_gaps(scaled[None])[0],
            torch.from_numpy(time_features(tail.ds, of.freq)),
            torch.from_numpy(time_features(ahead, of.freq)),
            torch.from_numpy(mean),
            torch.from_numpy(scale),
            ahead,
        )

    def _check_columns(self, record: Record) -> None:
        """Refuse columns that a model of a fixed number of variates, in their order, was not trained on."""
        variates, known = getattr(self.model, "variates", None), self.preprocessing.columns
        targets = record.file.layout.targets
        if variates is None or (len(targets) == 1 and variates == 1) or tuple(targets) == known:
            return
        raise BadRecord(
            f"{record.file.name}: this model takes the columns that it was trained on, in their order: "
            f"{', '.join(known)}; not {', '.join(targets)}"
        )

    def _check_missing(self, record: Record, tail: sources.Tail) -> None:
        """Refuse missing values, or where they are masked, columns of which nothing is known."""
        targets = record.file.layout.targets
        if self.preprocessing.missing == "refuse":
            try:
                check_missing(tail.values, targets, lambda i: record.file.where(tail.first + i))
            except DataError as error:
                raise BadRecord(str(error)) from None
        known = np.isin(targets, self.preprocessing.scaler.columns)
        empty = np.asarray(np.isnan(tail.values).all(axis=0))
        if empty.all() or (empty & ~known).any():
            column = targets[int((empty & ~known).argmax())]
            raise BadRecord(
                f"{record.file.name}: column {column!r} has no value in the last {len(tail.ds)} rows"
            )

    def collate(self, samples: Sequence[Sample]) -> list[Group]:
        """Stack samples; those with another number of columns form another group."""
        sizes = sorted({sample.x.shape[1] for sample in samples})
        return [self._group(samples, [i for i, s in enumerate(samples) if s.x.shape[1] == n]) for n in sizes]

    @staticmethod
    def _group(samples: Sequence[Sample], positions: list[int]) -> Group:
        of = [samples[i] for i in positions]
        return Group(
            tuple(positions),
            torch.stack([s.x for s in of]),
            torch.stack([s.x_mark for s in of]),
            torch.stack([s.y_mark for s in of]),
            torch.stack([s.mean for s in of])[:, None],
            torch.stack([s.scale for s in of])[:, None],
            tuple(s.ds for s in of),
        )

    def forward(self, batch: list[Group]) -> list[Forecast]:
        """Run the model, and return to the records' own units in float64."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        found: dict[int, Forecast] = {}
        with torch.inference_mode():
            for group in batch:
                inputs = (t.to(device) for t in (group.x, group.x_mark, group.y_mark))
                values = self.model(*inputs).double().cpu() * group.scale + group.mean  # [B, P, N]
                for i, ds, value in zip(group.positions, group.ds, values.numpy(), strict=True):
                    found[i] = Forecast(ds, value)
        return [found[i] for i in sorted(found)]

    def rows(self, outputs: list[Forecast], records: Sequence[Record]) -> list[Row]:
        """Make rows `unique_id, ds, yhat` in original units, series by series.

        `unique_id` is a wide file's column name, a long file's id, or `id/column` where an id has several
        targets; `name/` stands before it when several files are given. A column that the train data had is
        scaled by the train rows' statistics; any other by those of its own context window.
        """
        return [
            {"unique_id": name, "ds": ds, "yhat": yhat}
            for output, record in zip(outputs, records, strict=True)
            for name, values in zip(record.names, output.values.T.tolist(), strict=True)
            for ds, yhat in zip(output.ds.tolist(), values, strict=True)
        ]
