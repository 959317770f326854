"""Whole series in, filled cells or scored rows out: what batch jobs and serving see. No lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Row
from manyheads.timeseries import inputs, sources
from manyheads.timeseries.inputs import Shard
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.reconstruction import stream
from manyheads.timeseries.reconstruction.scores import rebuild, row_scores
from manyheads.timeseries.reconstruction.stream import Broken, Floats, Group, Piece, Sample

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig


def _open(source: core.Source, size: int, of: Preprocessing) -> list[Shard]:
    files = inputs.open_all(
        source,
        lambda path, prefix: sources.open_file(path, prefix, **of.named),
        lambda frame: sources.open_frame(frame, **of.named),
    )
    return inputs.cut(files, size)


@dataclass(frozen=True)
class Batch:
    """Samples in groups, and in their order."""

    groups: list[Group]
    samples: Sequence[Sample]


def _rebuild(model: nn.Module, batch: Batch, passes: int = 1, gap: int = 1) -> list[Floats]:
    """Return the windows as the model rebuilds them, scaled, in the samples' order.

    Shape:
        Each `[L, N]`.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: dict[int, Floats] = {}
    for group in batch.groups:
        x, observed, x_mark = (each.to(device) for each in (group.x, group.observed, group.x_mark))
        with torch.inference_mode():
            made = rebuild(model, x, observed, x_mark, passes, gap).double().cpu()
        found.update(zip(group.positions, made.numpy(), strict=True))
    return [found[i] for i in range(len(found))]


class ImputationPredictor:
    """Fill the missing cells of series in CSV, parquet or pandas tables; long, wide or panel.

    Args:
        model: Maps x, observed `[B, L, N]` and x_mark to windows.
        preprocessing: How the train data were treated.
        every: Return all cells, the observed ones as they are; by default the filled ones alone.
    """

    batch_size = 64
    columns: Mapping[str, str] = {"unique_id": "string", "ds": "timestamp[us]", "y": "double"}

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, every: bool = False) -> None:
        self.model, self.preprocessing, self.every = model.eval(), preprocessing, every

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> ImputationPredictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing is not what `ImputationData` writes.
        """
        return cls(model, Preprocessing.from_json(config.preprocessing))

    def predict(self, source: core.Source, every: bool | None = None) -> pd.DataFrame:
        """Fill a whole source in memory.

        Args:
            source: Path of a CSV or parquet file, several paths, or a DataFrame.
            every: Return all cells, not the filled ones alone; None as the predictor does.

        Raises:
            DataError: What is wrong with the source or a record.

        Example:
            >>> manyheads.load("runs/itransformer_etth1_imputation").predict("file.csv")
        """
        every = self.every if every is None else every
        return core.predict(ImputationPredictor(self.model, self.preprocessing, every), source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` series, in order.

        Raises:
            DataError: A file or its columns cannot be used, or a series stands in two places.
        """
        return _open(source, size, self.preprocessing)

    def read(self, shard: Shard) -> Iterator[Piece | Broken]:
        """Stream the windows of a shard's series."""
        return stream.read(shard, self.preprocessing)

    def prepare(self, record: Piece | Broken) -> Sample:
        """Check and scale a window.

        Raises:
            BadRecord: It could not be read, or of a column nothing is known to fill it from.
        """
        piece, of = stream.check(record, self.preprocessing), self.preprocessing
        targets, variates = piece.file.layout.targets, getattr(self.model, "variates", None)
        if variates is not None and variates != 1 and targets != of.columns:
            _refuse_columns(piece, of)
        empty = np.isnan(piece.values).all(axis=0)
        known = np.isin(targets, of.scaler.columns) & (of.treatment.scaling == "global")
        if empty.all() or (empty & ~known).any():
            column = targets[int((empty & ~known).argmax())]
            raise BadRecord(
                f"{piece.file.name}, {piece.ds[0].item()} to {piece.ds[-1].item()}: column {column!r} has no "
                f"value there to fill its gaps from; train with a longer seq_len than {of.seq_len}"
            )
        return stream.prepare(piece, of)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples; those without a gap need no model."""
        gaps = [i for i, sample in enumerate(samples) if not sample.observed.all()]
        groups = stream.collate([samples[i] for i in gaps])
        return Batch(groups, samples)

    def forward(self, batch: Batch) -> list[Floats]:
        """Run the model on windows with gaps, and return to their own units.

        Shape:
            Each `[L, N]`; of a window without a gap `[0, N]`.
        """
        rebuilt = iter(_rebuild(self.model, batch))
        return [
            s.mean[None][:0] if s.observed.all() else next(rebuilt) * s.scale + s.mean for s in batch.samples
        ]

    def rows(self, outputs: Sequence[Floats], records: Sequence[Piece | Broken]) -> list[Row]:
        """Make rows `unique_id, ds, y`, window by window, in original units; observed values never change.

        `unique_id` is a wide file's column name, a long file's id, or `id/column` where an id has several
        targets; `name/` stands before it when several files are given.
        """
        found: list[Row] = []
        for made, piece in zip(outputs, cast(Sequence[Piece], records), strict=True):
            missing = np.isnan(piece.values)
            filled = np.where(missing, made, piece.values) if len(made) else piece.values
            wanted = missing | self.every
            wanted[: len(wanted) - piece.new] = False
            ds = piece.ds.tolist()
            for j, name in enumerate(_names(piece)):
                at = np.flatnonzero(wanted[:, j]).tolist()
                found += [{"unique_id": name, "ds": ds[i], "y": float(filled[i, j])} for i in at]
        return found


def _names(piece: Piece) -> tuple[str, ...]:
    """Return the unique_id of each column's rows, as the forecasters name them."""
    file = piece.file
    if file.layout.id is None:
        return tuple(f"{file.prefix}{target}" for target in file.layout.targets)
    targets = file.layout.targets
    return (piece.name,) if len(targets) == 1 else tuple(f"{piece.name}/{target}" for target in targets)


def _refuse_columns(piece: Piece, of: Preprocessing) -> None:
    raise BadRecord(
        f"{piece.file.name}: this model takes the columns that it was trained on, in their order: "
        f"{', '.join(of.columns)}; not {', '.join(piece.file.layout.targets)}"
    )


class AnomalyPredictor:
    """Score the rows of series in CSV, parquet or pandas tables by how badly the model rebuilds them.

    Args:
        model: Maps x, observed `[B, L, N]` and x_mark to windows.
        preprocessing: How the train data were treated.
        thresholds: What an anomaly's score is above: a row's, and a column's each.
        passes: In how many passes a window's cells are hidden in turn; 1 hides none.
        gap: Steps of a run of hidden cells.

    Raises:
        DataError: The thresholds are not those of the columns.
    """

    batch_size = 64
    columns: Mapping[str, str] = {
        "unique_id": "string",
        "ds": "timestamp[us]",
        "score": "double",
        "anomaly": "bool",
    }

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        thresholds: Sequence[float],
        passes: int = 1,
        gap: int = 1,
    ) -> None:
        if len(thresholds) != 1 + len(preprocessing.columns):
            raise DataError(
                f"{len(thresholds)} thresholds for {len(preprocessing.columns)} columns and their mean"
            )
        self.model, self.preprocessing = model.eval(), preprocessing
        self.thresholds, self.passes, self.gap = np.asarray(thresholds, np.float64), passes, gap

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> AnomalyPredictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing is not what `DetectionData` and `Detector` write.
        """
        saved = dict(config.preprocessing)
        found, *turns = (saved.pop(key, None) for key in ("thresholds", "passes", "gap"))
        if not isinstance(found, list) or not all(type(each) in (int, float) for each in found):
            raise DataError(f"the model's preprocessing has thresholds = {str(found)[:80]}")
        if not all(type(each) is int and each >= 1 for each in turns):
            raise DataError(f"the model's preprocessing has passes and gap = {str(turns)[:80]}")
        passes, gap = cast("list[int]", turns)
        return cls(model, Preprocessing.from_json(saved), cast("list[float]", found), passes, gap)

    def predict(self, source: core.Source) -> pd.DataFrame:
        """Score a whole source in memory.

        Args:
            source: Path of a CSV or parquet file, several paths, or a DataFrame.

        Raises:
            DataError: What is wrong with the source or a record.

        Example:
            >>> rows = manyheads.load("runs/itransformer_etth1_anomaly").predict("file.csv")
            >>> rows[rows.anomaly]
        """
        return core.predict(self, source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` series, in order.

        Raises:
            DataError: A file or its columns cannot be used, or a series stands in two places.
        """
        return _open(source, size, self.preprocessing)

    def read(self, shard: Shard) -> Iterator[Piece | Broken]:
        """Stream the windows of a shard's series."""
        return stream.read(shard, self.preprocessing)

    def prepare(self, record: Piece | Broken) -> Sample:
        """Check and scale a window.

        Raises:
            BadRecord: It could not be read, a value is missing where that is refused, or its columns are not
                those whose usual scores are known.
        """
        piece, of = stream.check(record, self.preprocessing), self.preprocessing
        targets = piece.file.layout.targets
        if targets != of.columns and not len(targets) == len(of.columns) == 1:  # one may have another name
            _refuse_columns(piece, of)
        return stream.prepare(piece, of)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples."""
        return Batch(stream.collate(samples), samples)

    def forward(self, batch: Batch) -> list[Floats]:
        """Score windows.

        Shape:
            Each `[L, 1 + N]`: a row's score and its columns', NaN where nothing is observed.
        """
        rebuilt = _rebuild(self.model, batch, self.passes, self.gap)
        return [
            row_scores(torch.from_numpy(made), sample.x, sample.observed).numpy()
            for made, sample in zip(rebuilt, batch.samples, strict=True)
        ]

    def rows(self, outputs: Sequence[Floats], records: Sequence[Piece | Broken]) -> list[Row]:
        """Make rows `unique_id, ds, score, anomaly`, window by window.

        A series' own rows have its id, or a wide file's name, as `unique_id`, and the mean of the columns'
        scores; where there are several columns, the rows of each follow as `id/column`. `name/` stands before
        it when several files are given. A score is a squared error in units of the scaled data; one of which
        nothing is observed is NaN, and no anomaly.
        """
        found: list[Row] = []
        for scores, piece in zip(outputs, cast(Sequence[Piece], records), strict=True):
            targets, ds = piece.file.layout.targets, piece.ds[-piece.new :].tolist()
            names = [piece.name, *(f"{piece.name}/{target}" for target in targets if len(targets) > 1)]
            for j, name in enumerate(names):
                mine = scores[-piece.new :, j]
                flags = (mine > self.thresholds[j]).tolist()
                found += [
                    {"unique_id": name, "ds": when, "score": score, "anomaly": flag}
                    for when, score, flag in zip(ds, mine.tolist(), flags, strict=True)
                ]
        return found
