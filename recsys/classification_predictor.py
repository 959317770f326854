"""Tables of texts and customers' variables in, classes out: what batch jobs and serving see. No lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core import tables
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.predictor import Row
from manyheads.core.tables import CSV_ENDINGS, PARQUET_ENDINGS, Rows
from manyheads.recsys.customers import Cells, Customers, Inputs, Sample, text_of
from manyheads.recsys.models.cross_attention import CrossAttentionFusion

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from manyheads.core.hub import ModelConfig

OutputKind: TypeAlias = Literal["label", "probabilities"]
KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
TOP_K = 5
ENDINGS = (*CSV_ENDINGS, *PARQUET_ENDINGS)


@dataclass(frozen=True)
class Options:
    """What rows are made of.

    Args:
        output_kind: `label`, the most probable ones, each with its probability; or `probabilities`, a list in
            the order of the model folder's labels.
        top_k: How many labels; a model of fewer classes gives all.

    Raises:
        UsageError: There is no such kind, or no label is asked for.
    """

    output_kind: OutputKind = "label"
    top_k: int = TOP_K

    def __post_init__(self) -> None:
        if self.output_kind not in KINDS:
            close = did_you_mean(str(self.output_kind), KINDS)
            raise UsageError(f"no output kind {self.output_kind!r}{close} (kinds: {', '.join(KINDS)})")
        if self.top_k < 1:
            raise UsageError(f"--top-k takes 1 or more, not {self.top_k}")


@dataclass(frozen=True)
class Shard:
    """Some rows of a file or of a DataFrame.

    Args:
        rows: Where they lie, or they themselves.
        first: The number of the first.
        prefix: What ids begin with, where there are several files.
    """

    rows: Rows | pa.Table
    first: int
    prefix: str = ""


@dataclass(frozen=True)
class Record:
    """A row's cells by column."""

    id: str
    cells: Cells


class Predictor:
    """Classifies rows of texts and variables.

    A source is a CSV or parquet file with training's columns, several, a folder of them, or a DataFrame. What
    is missing, and a category that training did not know, is what `customers` says of it.

    Args:
        model: Maps texts, numbers and categories to logits.
        customers: What training knew of the columns.
        options: What rows are made of.
    """

    batch_size = 128
    shard_size = 8192

    def __init__(
        self, model: CrossAttentionFusion, customers: Customers, options: Options | None = None
    ) -> None:
        self.model, self.customers = model.eval(), customers
        found = Options() if options is None else options
        self.options = replace(found, top_k=min(found.top_k, len(customers.labels)))

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing does not fit the model.
        """
        if not isinstance(model, CrossAttentionFusion):
            raise DataError(f"{config.name} is no classifier of texts and variables")
        customers = Customers.from_json(config.preprocessing)
        for name, value in customers.model_inputs().items():
            if config.arguments.get(name) != value:
                given = config.arguments.get(name)
                raise DataError(f"the model folder's data has {name} {value}, its model {given}")
        return cls(model, customers)

    @property
    def columns(self) -> Mapping[str, str]:
        """`id`, and `label, probability, label_2 ...`, or `probabilities`."""
        if self.options.output_kind == "probabilities":
            return {"id": "string", "probabilities": "list<float32>"}
        ends = ["", *(f"_{place}" for place in range(2, self.options.top_k + 1))]
        pairs = ((f"label{end}", f"probability{end}") for end in ends)
        return {"id": "string"} | {
            name: kind for pair in pairs for name, kind in zip(pair, ("string", "float32"), strict=True)
        }

    @property
    def settings(self) -> dict[str, str | int]:
        """The options by name."""
        return dict(vars(self.options))

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with other options.

        Raises:
            UsageError: One has no such value.
        """
        options = replace(self.options, **cast(dict[str, Any], dict(settings)))
        return Predictor(self.model, self.customers, options)

    def predict(self, source: core.Source, **settings: str | int) -> pd.DataFrame:
        """Classify a whole source in memory; arguments as `Options`.

        Raises:
            DataError: What is wrong with the source or a row.
            UsageError: An option has no such value, or there is none of this name.

        Example:
            >>> manyheads.load("runs/likes_ml_100k/model").predict("opinions.csv", top_k=1)
        """
        return core.predict(core.configure(self, settings), source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` rows.

        Raises:
            DataError: A file cannot be read, or lacks a column.
            UsageError: There is no such source.
        """
        import pandas as pd
        import pyarrow as pa

        if isinstance(source, pd.DataFrame):
            names = [str(name) for name in source.columns]
            tables.check_columns("DataFrame", names, self._wanted)
            columns = {name: [_plain(cell) for cell in source[name]] for name in self._wanted}
            table = pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})
            return [Shard(table.slice(first, size), first) for first in range(0, len(table), size)]
        files = _files(source)
        found = []
        for file in files:
            tables.check_columns(str(file), tables.column_names(file), self._wanted)
            prefix = f"{tables.stem_of(file)}/" if len(files) > 1 else ""
            found += [Shard(rows, rows.first, prefix) for rows in tables.cut(file, size)]
        return found

    @property
    def _wanted(self) -> list[str]:
        of = self.customers.fields
        return list(dict.fromkeys([*of.inputs, *([of.id] if of.id is not None else [])]))

    def count(self, shard: Shard) -> int:
        """Return how many rows a shard has."""
        return shard.rows.count if isinstance(shard.rows, Rows) else len(shard.rows)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Stream a shard's rows; one without an id has its number."""
        rows, name = shard.rows, self.customers.fields.id
        number = shard.first
        for table in tables.read_rows(rows, self._wanted) if isinstance(rows, Rows) else [rows]:
            for cells in table.to_pylist():
                id = None if name is None else text_of(cells[name])
                yield Record(f"{shard.prefix}{number if id is None else id}", cells)
                number += 1

    def prepare(self, record: Record) -> Sample:
        """Take a row's cells.

        Raises:
            BadRecord: A cell is no number.
        """
        return self.customers.sample(record.cells)

    def collate(self, samples: Sequence[Sample]) -> Inputs:
        """Put rows together, their texts as tokens."""
        return self.customers.batch(samples)

    @torch.inference_mode()
    def forward(self, batch: Inputs) -> Tensor:
        """Return the classes' probabilities, `[B, classes]`, float64."""
        device = next(self.model.parameters()).device
        logits = self.model(batch.texts.to(device), batch.numbers.to(device), batch.kinds.to(device))
        logits = logits.double().cpu()
        return logits.sigmoid() if self.customers.fields.separator else logits.softmax(1)

    def rows(self, outputs: Tensor, records: Sequence[Record]) -> list[Row]:
        """Make a row a record."""
        names, labels = list(self.columns), self.customers.labels
        if self.options.output_kind == "probabilities":
            return [
                dict(zip(names, (record.id, values), strict=True))
                for record, values in zip(records, outputs.tolist(), strict=True)
            ]
        best = outputs.sort(dim=1, descending=True, stable=True)
        found = []
        for record, values, places in zip(records, best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip(places[: self.options.top_k], values, strict=False)
            cells = [cell for place, value in pairs for cell in (labels[place], value)]
            found.append(dict(zip(names, (record.id, *cells), strict=True)))
        return found


def _plain(cell: object) -> str | None:
    """Return a DataFrame's cell as text, a missing one as None."""
    if cell is None or cell != cell:  # noqa: PLR0124  # NaN
        return None
    import pandas as pd

    return None if cell is pd.NA or cell is pd.NaT else str(cell)


def _files(source: core.Source) -> list[Path]:
    """Return the tables that a source names, those of a folder in order of name."""
    listed = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(listed, Sequence) or not all(isinstance(each, str | os.PathLike) for each in listed):
        raise UsageError("rows come from a CSV or parquet file, several, a folder of them, or a DataFrame")
    found = []
    for each in listed:
        path = Path(each)
        if not path.exists():
            raise UsageError(f"no file or folder {path}")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in inside if file == path or _is_table(file)]
        if not files:
            raise UsageError(f"{path} holds no table ({', '.join(ENDINGS)})")
        found += files
    names = [tables.stem_of(file) for file in found]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two files are called {double!r}, so ids would not differ; rename one")
    return found


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and not file.name.startswith((".", "_")) and file.is_file()
