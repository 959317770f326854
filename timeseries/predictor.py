"""Forecasts of new series: tables in, rows out. Torch only, no lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, UsageError
from manyheads.timeseries import inputs, samples, sources
from manyheads.timeseries.calendar import Times
from manyheads.timeseries.calls import Probabilistic, check_known, check_levels, forecast
from manyheads.timeseries.conformal import SplitConformal
from manyheads.timeseries.inputs import Shard
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.samples import Group, Record, Sample
from manyheads.timeseries.sources import File
from manyheads.timeseries.tails import open_ahead
from manyheads.timeseries.windows import Batch

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

Row = core.Row
DISTRIBUTION_LEVELS = (0.1, 0.5, 0.9)  # of a model that has any


@dataclass(frozen=True)
class Output:
    """One record's forecast in its own units.

    Shape:
        ds `[P]`, point `[P, N]`, quantiles `[P, N, Q]`.
    """

    ds: Times
    point: NDArray[np.float64]
    quantiles: NDArray[np.float64]


@dataclass(frozen=True)
class WithFuture:
    """A source, and the future covariates of its series in a table of their own."""

    source: core.Source
    future: core.Source


class Predictor:
    """Forecasts series of CSV or parquet files, or of a DataFrame; long, wide or panel, with covariates.

    Args:
        model: Any forecasting module of the catalogue.
        preprocessing: How the train data were treated.
        quantiles: Levels of the quantiles to give, rising; None takes the ends of its conformal intervals
            where it has some, else those that the model has, and of a distribution 0.1, 0.5 and 0.9.

    Raises:
        UsageError: The levels are out of order, or the model has not got one of them.
    """

    batch_size = 64

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, quantiles: Sequence[float] | None = None
    ) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing
        saved = preprocessing.conformal
        self.conformal = SplitConformal.from_json(saved) if saved else None
        self.quantiles = levels_of(self.conformal or model, quantiles)

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of a row and their Arrow types."""
        fixed = {"unique_id": "string", "ds": "timestamp[us]", "yhat": "double"}
        return fixed | {f"yhat_q{level}": "double" for level in self.quantiles}

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing is not what `ForecastData` writes.
        """
        return cls(model, Preprocessing.from_json(config.preprocessing))

    def predict(
        self,
        source: core.Source,
        future: core.Source = None,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
    ) -> pd.DataFrame:
        """Forecast a whole source in memory.

        Args:
            source: Path of a CSV or parquet file, several paths, or a DataFrame.
            future: The future covariates of the horizon, as a table of their own; without it the rows at each
                series' end that have no target hold them.
            horizon: How many steps to return; as many as the model has if not given.
            quantiles: Levels of the quantiles to give, rising, in place of the predictor's.

        Raises:
            DataError: What is wrong with the source or a record.
            UsageError: The horizon is longer than the model's, or it has not got the quantiles.

        Example:
            >>> manyheads.load("quickstart/model").predict("file.csv")
        """
        most = self.preprocessing.pred_len
        if horizon is not None and not 1 <= horizon <= most:
            raise UsageError(f"horizon {horizon}: the model was trained to forecast 1 to {most} steps")
        of = self if quantiles is None else Predictor(self.model, self.preprocessing, quantiles)
        rows = core.predict(of, source if future is None else WithFuture(source, future))
        if horizon is None or horizon == most:
            return rows
        return rows[rows.index % most < horizon].reset_index(drop=True)

    def _files(self, source: core.Source) -> list[File]:
        if isinstance(source, WithFuture):
            return [
                replace(file, ahead=open_ahead(source.future, file.layout))
                for file in self._files(source.source)
            ]
        named = self.preprocessing.named
        return inputs.open_all(
            source,
            lambda path, prefix: sources.open_file(path, prefix, **named),
            lambda frame: sources.open_frame(frame, **named),
        )

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` records, in order.

        Args:
            source: Path of a CSV or parquet file, several paths, or a DataFrame.
            size: Records a shard.

        Raises:
            DataError: A file or its columns cannot be used, or a series stands in two places.
        """
        return inputs.cut(self._files(source), size)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Stream a shard's records, each with the rows that the model needs."""
        of = self.preprocessing
        for i, places in groupby(shard.runs, key=lambda place: place[0]):
            file = shard.files[i]
            runs = [run for _, run in places]
            for run, tail in sources.read_runs(file, runs, of.seq_len, of.pred_len, of.freq):
                name = f"{file.prefix}{run.id}" if file.layout.id else run.id
                yield Record(name, run.id, self._names(file, name), file, tail)

    @staticmethod
    def _names(file: File, name: str) -> tuple[str, ...]:
        """Return the unique_id of each target's rows."""
        targets = file.layout.targets
        if file.layout.id is None:
            return tuple(f"{file.prefix}{target}" for target in targets)
        return (name,) if len(targets) == 1 else tuple(f"{name}/{target}" for target in targets)

    def prepare(self, record: Record) -> Sample:
        """Check a record's context window, and make the model's inputs of it.

        Raises:
            BadRecord: Too short, a value missing, a cell that is no number, timestamps out of order or of
                another frequency, an unknown category (names the row), a future that does not reach to the
                horizon's end, or not the columns that the model is built for.
        """
        made = samples.prepare(record, self.preprocessing, getattr(self.model, "variates", None))
        unknown = sorted(set(made.columns) - set(self.conformal.columns)) if self.conformal else []
        if unknown:
            raise BadRecord(f"{record.file.name}: no conformal interval was made for column {unknown[0]!r}")
        return made

    def collate(self, records: Sequence[Sample]) -> list[Group]:
        """Stack samples; those with another number of columns form another group."""
        return samples.collate(records)

    def forward(self, batch: list[Group]) -> list[Output]:
        """Run the model, and return to the records' own units in float64."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        found: dict[int, Output] = {}
        for group in batch:
            given = {key: value.to(device) for key, value in group.inputs.items()}
            y = given["x"].new_full((*given["y_mark"].shape[:2], group.mean.shape[-1]), float("nan"))
            with torch.inference_mode():
                point, quantiles = self._scaled(cast(Batch, {**given, "y": y}), group.columns)
            point = point * group.scale + group.mean
            quantiles = quantiles * group.scale[..., None] + group.mean[..., None]
            for i, ds, one, its in zip(group.positions, group.ds, point, quantiles, strict=True):
                found[i] = Output(ds, one.numpy(), its.numpy())
        return [found[i] for i in sorted(found)]

    def _scaled(self, batch: Batch, columns: Sequence[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
        """Forecast a batch in its own units, in float64: `[B, P, N]` and `[B, P, N, Q]`."""
        made = forecast(self.model, batch, () if self.conformal else self.quantiles)
        point = made.point.double().cpu()
        if self.conformal:
            pairs = zip(point, columns, strict=True)
            return point, torch.stack([self.conformal.apply(one, self.quantiles, c) for one, c in pairs])
        return point, point[..., None][..., :0] if made.quantiles is None else made.quantiles.double().cpu()

    def rows(self, outputs: list[Output], records: Sequence[Record]) -> list[Row]:
        """Make rows `unique_id, ds, yhat`, and a column a quantile, in original units, series by series.

        `unique_id` is a wide file's column name, a long file's id, or `id/column` where an id has several
        targets; `name/` stands before it when several files are given. A column that the train data had is
        scaled by the train rows' statistics; any other by those of its own context window.
        """
        names = list(self.columns)
        return [
            dict(zip(names, (name, ds, yhat, *spread), strict=True))
            for output, record in zip(outputs, records, strict=True)
            for j, name in enumerate(record.names)
            for ds, yhat, spread in zip(
                output.ds.tolist(), output.point[:, j].tolist(), output.quantiles[:, j].tolist(), strict=True
            )
        ]


def levels_of(model: object, wanted: Sequence[float] | None) -> tuple[float, ...]:
    """Return the quantiles that a model is asked for: those wanted, or those that it has.

    Raises:
        UsageError: The levels are out of order, or the model has not got one of them.
    """
    known = model.levels if isinstance(model, Probabilistic | SplitConformal) else ()
    if wanted is None:
        return DISTRIBUTION_LEVELS if known is None else known
    check_levels(wanted)
    check_known(wanted, known)
    return tuple(wanted)
