"""CSV and parquet files, and DataFrames, as pyarrow tables; what cannot be read is named by its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from manyheads.core.errors import DataError
from manyheads.core.tables import (
    HEADER,
    csv_header,
    kind_of,
    line_blocks,
    open_csv,
    parse_csv,
    refusing_broken,
)
from manyheads.timeseries.tables import plain_numbers, plain_times

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_BLOCK = 8 << 20  # bytes of CSV held at a time


class Parquet:
    """A parquet file as a table whose columns are read when they are asked for: one is held at a time.

    Args:
        path: The file.
        coded: Columns that hold few different texts: each text is held once.
    """

    def __init__(self, path: Path, coded: Sequence[str] = ()) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = pa.string(), pa.large_string()
        types = {field.name: field.type for field in pq.read_schema(path)}
        self._path = path
        self._file = pq.ParquetFile(path, read_dictionary=[name for name in coded if types[name] in texts])

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        with refusing_broken(self._path):
            return self._file.read([column])[column]


Table: TypeAlias = "pa.Table | Parquet"


def read_table(
    path: Path, columns: Sequence[str], coded: Sequence[str] = (), time: str | None = None
) -> tuple[Table, str]:
    """Read columns of a whole file; returns its table, and "line" or "row" as its rows are to be named.

    Args:
        path: The file.
        columns: The columns to keep.
        coded: Those that hold few different texts: each is held once.
        time: The one of timestamps.

    Raises:
        DataError: The file cannot be read, or has no rows.
    """
    with refusing_broken(path):
        if kind_of(path) == "parquet":
            return Parquet(path, coded), "row"
        compact = _read_compact(path, columns, coded, time)
        if compact is not None:
            return compact, "line"
        with open_csv(path) as stream:
            data = stream.read()
    data = data.rstrip(b"\r\n")
    names, _, rows = csv_header(data, str(path)), *data.partition(b"\n")[1:]
    if not rows:
        raise DataError(f"{path}: a header and no rows")
    return parse_csv(rows, str(path), names, columns), "line"


def _read_compact(
    path: Path, columns: Sequence[str], coded: Sequence[str], time: str | None
) -> pa.Table | None:
    """Read a CSV block by block, each cell at once as what it is, so that the text is never held.

    None where a cell is not plainly that: the whole text is then needed, to read it otherwise or to name it.
    """
    import pyarrow as pa

    def cells(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        if name in coded:
            return column.dictionary_encode()
        return plain_times(column) if name == time else plain_numbers(column)

    blocks = []
    with open_csv(path) as stream:
        names = csv_header(stream.readline(HEADER), str(path))
        try:
            for block in line_blocks(stream, _BLOCK):
                table = parse_csv(block, str(path), names, columns)
                blocks.append(pa.table({name: cells(table[name], name) for name in columns}))
        except (pa.ArrowInvalid, DataError):
            return None
    return pa.concat_tables(blocks) if blocks else None


def release() -> None:
    """Give back what pyarrow holds for reuse: on a large file that is as much as its columns."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def from_pandas(frame: pd.DataFrame) -> pa.Table:
    """Turn a DataFrame into columns; cells of mixed kinds become text, to be read or refused cell by cell."""
    import pandas as pd
    import pyarrow as pa

    if isinstance(frame.index, pd.DatetimeIndex):
        frame = frame.reset_index(names=frame.index.name or "ds")
    made = {}
    for name in frame.columns:
        try:
            made[str(name)] = pa.chunked_array([pa.array(frame[name], from_pandas=True)])
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError):
            cells = [None if pd.isna(cell) else str(cell) for cell in frame[name]]
            made[str(name)] = pa.chunked_array([pa.array(cells, pa.string())])
    return pa.table(made)
