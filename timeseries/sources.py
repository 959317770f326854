"""Files as streams of records: where each series lies, and its last rows, read in bounded memory.

A wide file is one record. In a long file each id is one, and its rows must stand together, so that a record
can be read at its place without reading the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.core.tables import (
    column_names,
    kind_of,
    line_blocks,
    open_csv,
    parse_csv,
    refusing_broken,
    stem_of,
)
from manyheads.timeseries.layout import ColumnNames, Layout, find_layout
from manyheads.timeseries.readers import from_pandas
from manyheads.timeseries.tails import Ahead, Tail, read_tail

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

BLOCK = 8 << 20  # bytes of CSV held at a time
BATCH = 1 << 16  # rows of parquet held at a time


@dataclass(frozen=True)
class File:
    """A source file, or a table in memory.

    Args:
        name: Path, or "DataFrame".
        kind: How it is read.
        names: All its columns.
        layout: Which of them are what.
        stem: The id of a wide file's record.
        prefix: What stands before ids, so that those of several files differ.
        table: The table in memory.
        ahead: Future covariates from a second table.
    """

    name: str
    kind: Literal["csv", "parquet", "table"]
    names: tuple[str, ...]
    layout: Layout
    stem: str
    prefix: str = ""
    table: pa.Table | None = None
    ahead: Ahead | None = None

    def where(self, row: int) -> str:
        """Name a data row to the user: the line of a CSV, else the row counted from 0."""
        return f"{self.name}, line {row + 2}" if self.kind == "csv" else f"{self.name}, row {row}"


@dataclass(frozen=True)
class Run:
    """Where one record lies: rows from `first` to `end` (None: the file's end), in a CSV also bytes."""

    id: str
    first: int = 0
    end: int | None = None
    start_byte: int = 0
    end_byte: int | None = None


def open_file(path: Path, prefix: str = "", **named: Unpack[ColumnNames]) -> File:
    """Read a file's header and find its columns.

    A time, id or target column named that the file lacks falls back to the usual one; not so a covariate.

    Raises:
        DataError: The file or its columns cannot be used.
    """
    import pyarrow.parquet as pq

    kind, names = kind_of(path), column_names(path)
    with refusing_broken(path):
        if kind == "parquet" and pq.read_metadata(path).num_rows == 0:
            raise DataError(f"{path}: no rows")
    return File(str(path), kind, tuple(names), _layout(names, str(path), named), stem_of(path), prefix)


def open_frame(frame: pd.DataFrame, **named: Unpack[ColumnNames]) -> File:
    """Take a DataFrame as a source."""
    table = from_pandas(frame)
    if len(table) == 0:
        raise DataError("DataFrame: no rows")
    layout = _layout(table.column_names, "DataFrame", named)
    return File("DataFrame", "table", tuple(table.column_names), layout, "data", table=table)


def _layout(names: Sequence[str], source: str, named: ColumnNames) -> Layout:
    there = named.copy()
    for key in ("time_column", "id_column"):
        if there.get(key) not in names:
            there[key] = None
    if not set(named.get("targets") or ()) & set(names):
        there["targets"] = None
    return find_layout(names, source, **there)


def _id_changes(column: pa.ChunkedArray, file: File, row: int) -> tuple[list[str], NDArray[np.int64]]:
    """Return the ids of a block's runs, and the block's rows at which they begin."""
    import pyarrow as pa
    import pyarrow.compute as pc

    coded = pc.cast(column, pa.large_string()).combine_chunks().dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy()
    begins = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    dictionary = coded.dictionary.to_pylist()
    ids = [dictionary[code] if code >= 0 else "" for code in codes[begins]]
    if "" in ids:
        raise DataError(f"{file.where(row + int(begins[ids.index('')]))}: no id in column {file.layout.id!r}")
    return ids, begins


@dataclass(frozen=True)
class Marks:
    """Series that begin or go on in a block: ids, the rows and bytes where they begin, the block's end."""

    ids: list[str]
    rows: NDArray[np.int64]
    bytes: NDArray[np.int64]
    end: tuple[int, int]


def _csv_marks(file: File) -> Iterator[Marks]:
    """Yield the marks of a CSV's blocks."""
    assert file.layout.id is not None
    row = 0
    with open_csv(Path(file.name)) as stream:
        stream.readline()
        byte = stream.tell()
        for block in line_blocks(stream, BLOCK):
            table = parse_csv(block, file.name, file.names, [file.layout.id], row + 2)
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
            if len(ends) + (not block.endswith(b"\n")) != len(table):
                raise DataError(f"{file.where(row)} or below: a quoted cell holds a line break; take it out")
            starts = np.concatenate([[0], ends])[: len(table)]
            ids, begins = _id_changes(table[0], file, row)
            end = (row + len(table), byte + len(block))
            yield Marks(ids, begins + row, starts[begins] + byte, end)
            row, byte = end


def _table_marks(file: File) -> Iterator[Marks]:
    """Yield the same of parquet or a table in memory, where bytes do not count."""
    row = 0
    for batch in _batches(file, 0, (file.layout.id or "",)):
        ids, begins = _id_changes(batch[0], file, row)
        yield Marks(ids, begins + row, np.zeros_like(begins), (row + len(batch), 0))
        row += len(batch)


def _batches(file: File, first: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of parquet or a table, from a row on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.table is not None:
        yield file.table.select(list(columns)).slice(first)
        return
    with pq.ParquetFile(file.name) as parquet:
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = np.cumsum([0, *groups])
        group = int(np.searchsorted(ends, first, side="right")) - 1
        skip = first - int(ends[group])
        for batch in parquet.iter_batches(BATCH, range(group, len(groups)), list(columns), use_threads=False):
            if skip < len(batch):
                yield pa.table(batch).slice(skip)
            skip = max(0, skip - len(batch))


def index(file: File) -> list[Run]:
    """Find where each series of a file lies, in one pass over its ids; a wide file is not read.

    Raises:
        DataError: An id stands in two places, a row has no id, or the file is broken or has no rows.
    """
    if file.layout.id is None:
        return [Run(file.stem)]
    marks: list[tuple[str, int, int]] = []
    end = (0, 0)
    with refusing_broken(file.name):
        for block in _csv_marks(file) if file.kind == "csv" else _table_marks(file):
            news = list(zip(block.ids, block.rows.tolist(), block.bytes.tolist(), strict=True))
            marks += news[1:] if marks and marks[-1][0] == block.ids[0] else news
            end = block.end
    if not marks:
        raise DataError(f"{file.name}: a header and no rows")
    seen: dict[str, int] = {}
    for ident, first, _ in marks:
        if ident in seen:
            raise DataError(
                f"{file.where(first)}: series {ident!r} began before, at {file.where(seen[ident])}; "
                "put the rows of a series together"
            )
        seen[ident] = first
    return [
        Run(name, first, stop, start_byte, end_byte)
        for (name, first, start_byte), (_, stop, end_byte) in pairwise([*marks, ("", *end)])
    ]


def read_runs(
    file: File, runs: Sequence[Run], keep: int, ahead: int, freq: str
) -> Iterator[tuple[Run, Tail | DataError]]:
    """Read the last rows of records, in file order; the timestamps of all their rows are checked.

    Args:
        file: The file.
        runs: Records of it, in order.
        keep: Rows of history to keep.
        ahead: Rows of the future to keep, where there are future covariates.
        freq: The frequency that timestamps must have.

    Yields:
        Each record's place with its last rows, or with what is wrong with it.
    """

    def tail(run: Run, blocks: Iterable[pa.Table]) -> Tail | DataError:
        try:
            made = read_tail(file.layout, blocks, lambda i: file.where(run.first + i), keep, ahead, freq)
            ident = f"{file.prefix}{run.id}" if file.layout.id else ""
            return file.ahead.extend(made, ident, ahead, freq) if file.ahead else made
        except DataError as error:
            return error

    for run, blocks in read_blocks(file, runs, file.layout.wanted):
        yield run, tail(run, blocks)


def read_blocks(
    file: File, runs: Sequence[Run], columns: Sequence[str]
) -> Iterator[tuple[Run, Iterator[pa.Table]]]:
    """Read columns of records, in file order.

    Args:
        file: The file.
        runs: Records of it, in order.
        columns: The columns to read.

    Yields:
        Each record's place with its rows, block by block, to be read before the next record's.
    """
    if file.kind == "csv":
        with open_csv(Path(file.name)) as stream:
            for run in runs:
                yield run, _csv_blocks(file, stream, run, columns)
        return
    for k, pieces in groupby(_pieces(file, runs, columns), key=itemgetter(0)):
        yield runs[k], (table for _, table in pieces)


def _pieces(file: File, runs: Sequence[Run], wanted: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows of runs from parquet or a table, piece by piece, with the run's number."""
    k, row = 0, runs[0].first
    for batch in _batches(file, row, wanted):
        end = row + len(batch)
        while k < len(runs) and runs[k].first < end:
            run = runs[k]
            stop = end if run.end is None else min(run.end, end)
            if max(row, run.first) < stop:
                yield k, batch.slice(max(row, run.first) - row, stop - max(row, run.first))
            if run.end is None or run.end > end:
                break
            k += 1
        if k == len(runs):
            return
        row = end


def _csv_blocks(file: File, stream: IO[bytes], run: Run, wanted: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a run of a CSV."""
    stream.seek(run.start_byte)
    if run.end_byte is None:
        stream.readline()  # a wide file: all after the header
    row = run.first
    for block in line_blocks(stream, BLOCK, run.end_byte):
        table = parse_csv(block, file.name, file.names, wanted, row + 2)
        row += len(table)
        yield table
