"""Tables of series in, classes out: what batch jobs and serving see. No lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Row
from manyheads.core.tables import column_names, kind_of, stem_of
from manyheads.timeseries import inputs, readers, sources, tables
from manyheads.timeseries.classification.data import pad
from manyheads.timeseries.classification.labelled import find_channels
from manyheads.timeseries.inputs import Shard
from manyheads.timeseries.layout import Layout
from manyheads.timeseries.scaling import StandardScaler
from manyheads.timeseries.sources import File

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from manyheads.core.hub import ModelConfig

_KEYS = {"seq_len", "columns", "labels", "id_column", "scaler"}


@dataclass(frozen=True)
class Record:
    """A series' last steps, or what is wrong with them.

    Shape:
        values `[T, C]`.
    """

    id: str
    source: str
    values: NDArray[np.float32] | DataError


class Predictor:
    """Classify the series of CSV, parquet or pandas tables with a row a step.

    The rows of a series stand together, in time order. Of a series that is longer than the model's window the
    last steps are taken.

    Args:
        model: Maps x `[B, L, C]` and observed `[B, L]` to logits `[B, classes]`.
        saved: What `LabelledData.preprocessing` returned.

    Raises:
        DataError: It is not that.
    """

    batch_size = 64

    def __init__(self, model: nn.Module, saved: Mapping[str, object]) -> None:
        if set(saved) != _KEYS:
            raise DataError(f"the model's preprocessing has {sorted(saved)}, not {sorted(_KEYS)}")
        columns, labels, seq_len = saved["columns"], saved["labels"], saved["seq_len"]
        for key, names in (("columns", columns), ("labels", labels)):
            if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
                raise DataError(f"the model's preprocessing has {key} = {str(names)[:80]}")
        if not isinstance(seq_len, int) or seq_len < 1:
            raise DataError(f"the model's preprocessing has seq_len = {seq_len!r}")
        self.model, self.seq_len = model.eval(), seq_len
        self.channels, self.labels = tuple(cast("list[str]", columns)), tuple(cast("list[str]", labels))
        self.id_column = cast("str | None", saved["id_column"])
        self.scaler = StandardScaler.from_json(cast("dict[str, list[object]]", saved["scaler"]))

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder."""
        return cls(model, config.preprocessing)

    @property
    def columns(self) -> Mapping[str, str]:
        """`unique_id`, the most probable `label`, its `probability`, and `p_<label>` of every class."""
        each = {f"p_{label}": "float64" for label in self.labels}
        return {"unique_id": "string", "label": "string", "probability": "float64", **each}

    def predict(self, source: core.Source) -> pd.DataFrame:
        """Classify a whole source in memory.

        Raises:
            DataError: What is wrong with the source or a record.
        """
        return core.predict(self, source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` series.

        Raises:
            DataError: A file or its columns cannot be used, or a series stands in two places.
        """

        def open_file(path: Path, prefix: str) -> File:
            names, kind = column_names(path), kind_of(path)
            layout = self._layout(names, str(path))
            return File(str(path), kind, tuple(names), layout, stem_of(path), prefix)

        def open_frame(frame: pd.DataFrame) -> File:
            table = readers.from_pandas(frame)
            layout = self._layout(table.column_names, "DataFrame")
            return File("DataFrame", "table", tuple(table.column_names), layout, "data", table=table)

        return inputs.cut(inputs.open_all(source, open_file, open_frame), size)

    def _layout(self, names: Sequence[str], source: str) -> Layout:
        ident, channels = find_channels(names, source, "", self.id_column, self.channels)
        return Layout("", ident, channels)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Stream a shard's series, the last steps of each."""
        for i, places in groupby(shard.runs, key=itemgetter(0)):
            file, runs = shard.files[i], [run for _, run in places]
            for run, blocks in sources.read_blocks(file, runs, file.layout.targets):
                yield Record(f"{file.prefix}{run.id}", file.name, self._values(file, run.first, blocks))

    def _values(self, file: File, row: int, blocks: Iterator[pa.Table]) -> NDArray[np.float32] | DataError:
        kept = np.zeros((0, len(self.channels)))
        try:
            for block in blocks:
                where = partial(_where, file, row)
                found = [tables.parse_numbers(block[c], c, where) for c in self.channels]
                kept = np.concatenate([kept, np.stack(found, axis=1)])[-self.seq_len :]
                row += len(block)
        except DataError as error:
            return error
        return kept.astype(np.float32)

    def prepare(self, record: Record) -> NDArray[np.float32]:
        """Check a series.

        Raises:
            BadRecord: A cell is no number, or a channel has no value.
        """
        if isinstance(record.values, DataError):
            raise BadRecord(str(record.values))
        empty = np.isnan(record.values).all(axis=0)
        if empty.any():
            column = self.channels[int(empty.argmax())]
            raise BadRecord(f"{record.source}: column {column!r} has no value in the series' last steps")
        return record.values

    def collate(self, samples: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Scale and pad series.

        Shape:
            x `[B, L, C]`, observed `[B, L]`.
        """
        return pad(samples, self.scaler, self.seq_len)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the classes' probabilities.

        Shape:
            `[B, classes]`, float64.
        """
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            return self.model(*(each.to(device) for each in batch)).double().softmax(dim=-1).cpu()

    def rows(self, outputs: Tensor, records: Sequence[Record]) -> list[Row]:
        """Make a row a series."""
        names = list(self.columns)
        best = outputs.argmax(dim=-1).tolist()
        return [
            dict(zip(names, (record.id, self.labels[k], p[k], *p), strict=True))
            for record, k, p in zip(records, best, outputs.tolist(), strict=True)
        ]


def _where(file: File, first: int, row: int) -> str:
    return file.where(first + row)
