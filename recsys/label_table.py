"""A table of texts, customers' variables and labels, and what training learns of its columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import BadRecord, DataError
from manyheads.core.tables import cut, read_rows
from manyheads.recsys.customers import Customers, Fields, Hidden, TextLimits, number_of, text_of
from manyheads.recsys.texts import TextTokens

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class LabelTable:
    """The wanted columns of a file, and the numbers of the rows in it.

    Args:
        source: The file's name.
        table: The columns.
        numbers: Of the rows, from 0.
        csv: Rows are told by their lines.

    Shape:
        numbers `[rows]`.
    """

    source: str
    table: pa.Table
    numbers: NDArray[np.int64]
    csv: bool

    @classmethod
    def read(cls, path: Path, wanted: Sequence[str]) -> LabelTable:
        """Read columns of a CSV or parquet file.

        Raises:
            DataError: It cannot be read, lacks a column, or has no rows.
        """
        import pyarrow as pa

        parts = cut(path, 1 << 40)
        if not parts:
            raise DataError(f"{path} has no rows")
        table = pa.concat_tables(list(read_rows(parts[0], wanted)))
        return cls(str(path), table, np.arange(len(table)), bool(parts[0].bytes[1]))

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> list[object]:
        """Return a column's cells."""
        found: list[object] = self.table[name].to_pylist()
        return found

    def rows(self, first: int, end: int) -> list[Mapping[str, object]]:
        """Return some rows' cells by column."""
        found: list[Mapping[str, object]] = self.table.slice(first, end - first).to_pylist()
        return found

    def take(self, rows: Sequence[int]) -> LabelTable:
        """Return some of the rows."""
        return replace(self, table=self.table.take(rows), numbers=self.numbers[list(rows)])

    def where(self, row: int) -> str:
        """Name a row to the user."""
        number = int(self.numbers[row])
        return f"{self.source}, {f'line {number + 2}' if self.csv else f'row {number}'}"


def learn(
    table: LabelTable,
    labels: list[list[str]],
    train: Sequence[int],
    fields: Fields,
    limits: TextLimits,
    hidden: Hidden,
) -> Customers:
    """Take vocabulary, means, categories and classes from the training rows.

    Args:
        table: All rows.
        labels: Those of each row.
        train: The training rows.
        fields: What the columns are.
        limits: How texts are cut.
        hidden: What the model is not shown.

    Raises:
        DataError: A column is empty in the training rows, or there are too few classes.
    """
    part = table.take(train)
    texts = [text for name in fields.texts for cell in part.column(name) if (text := text_of(cell))]
    if not texts:
        raise DataError(f"{table.source}: no training row has a text in {', '.join(fields.texts)}")
    tokens = TextTokens.train(dict.fromkeys([*fields.texts, *texts]), limits.vocab_size)
    mean, std = [], []
    for name in fields.numbers:
        try:
            values = np.array([number_of(cell, name) for cell in part.column(name)])
        except BadRecord:
            values = np.zeros(1)  # named by its line when rows are encoded
        if np.isnan(values).all():
            raise DataError(f"{table.source}: no training row has a number in {name!r}")
        mean.append(float(np.nanmean(values)))
        std.append(float(np.nanstd(values)) or 1.0)
    kinds = []
    for name in fields.categories:
        found = sorted({kind for cell in part.column(name) if (kind := text_of(cell)) is not None})
        if not found:
            raise DataError(f"{table.source}: no training row has a category in {name!r}")
        kinds.append(found)
    counts = Counter(label for row in train for label in labels[row])
    least = 1 if fields.separator else 2
    if len(counts) < least:
        raise DataError(f"{table.source}: the training rows have {len(counts)} classes; {least} are needed")
    return Customers(fields, limits, tokens, mean, std, kinds, sorted(counts), hidden)
