"""Files and frames as batches of columns: a log is never in memory as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from manyheads.core.errors import DataError, UsageError
from manyheads.core.tables import check_columns, refusing_broken

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Source: TypeAlias = "str | Path | pd.DataFrame | Sequence[str | Path]"

BLOCK = 16 << 20  # bytes of text held at a time
ROWS = 1 << 18  # of other tables
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".inter": "\t", ".data": "\t"}
PACKED = (".gz", ".bz2", ".zst")


@dataclass
class Broken:
    """Lines of a text table that have more or fewer cells than its header."""

    count: int = 0
    first: str = ""


@dataclass(frozen=True)
class Batch:
    """Some rows: the columns that were asked for, and where they lie.

    Args:
        source: The file's name, or "DataFrame".
        first: How many rows stand before these.
        columns: By name.
    """

    source: str
    first: int
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class Tables:
    """Where a log's rows come from: tables of the same columns, one behind the other.

    A source is a CSV file (`.csv`, or `.tsv`, `.tab`, `.data`, `.inter` with tabs; packed with gzip, bzip2 or
    zstd or not), a parquet file, a folder of these in order of name, several of them, or a DataFrame.

    Args:
        source: As above.
        names: Columns of text tables that have no header.
        broken: Counts lines that are no rows.
    """

    source: Source
    names: tuple[str, ...] | None = None
    broken: Broken = field(default_factory=Broken)

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """Stream the wanted columns; those of text tables are text.

        Raises:
            DataError: A table cannot be read, or has not got a column.
            UsageError: There is no such source.
        """
        import pandas as pd

        if isinstance(self.source, pd.DataFrame):
            yield from _frame_batches(self.source, wanted)
            return
        for path in list_files(self.source):
            first = 0
            with refusing_broken(path):
                for batch in self._read(path, wanted):
                    yield Batch(str(path), first, batch)
                    first += len(next(iter(batch.values())))

    def _read(self, path: Path, wanted: Sequence[str]) -> Iterator[dict[str, pa.Array]]:
        import pyarrow.parquet as pq

        if kind_of(path) != ".parquet":
            yield from self._read_text(path, SEPARATORS[kind_of(path)], wanted)
            return
        with pq.ParquetFile(str(path)) as file:
            check_columns(str(path), file.schema_arrow.names, wanted)
            for batch in file.iter_batches(ROWS, columns=list(wanted), use_threads=False):
                yield {name: batch.column(name) for name in wanted}

    def _read_text(self, path: Path, separator: str, wanted: Sequence[str]) -> Iterator[dict[str, pa.Array]]:
        import pyarrow as pa
        from pyarrow import csv

        def broken(row: Any) -> str:
            self.broken.count += 1
            line = "" if row.number is None else f", line {row.number}"
            self.broken.first = self.broken.first or (
                f"{path}{line}: {row.actual_columns} cells, not {row.expected_columns}"
            )
            return "skip"

        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        with pa.input_stream(str(path), compression="detect") as stream:
            reader = csv.open_csv(
                stream,
                csv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=self.names),
                csv.ParseOptions(delimiter=separator, invalid_row_handler=broken),
                csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string())),
            )
            check_columns(str(path), reader.schema.names, wanted)
            for batch in reader:
                yield {name: batch.column(name) for name in wanted}


def column_names(source: Source) -> list[str]:
    """Return the columns of a source, those of its first table.

    Raises:
        DataError: The table cannot be read.
        UsageError: There is no such source.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    if isinstance(source, pd.DataFrame):
        return [str(name) for name in source.columns]
    path = list_files(source)[0]
    with refusing_broken(path):
        if kind_of(path) == ".parquet":
            return list(pq.read_schema(str(path)).names)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        with pa.input_stream(str(path), compression="detect") as stream:
            separator = SEPARATORS[kind_of(path)]
            parse = csv.ParseOptions(delimiter=separator, invalid_row_handler=lambda row: "skip")
            return list(csv.open_csv(stream, csv.ReadOptions(block_size=BLOCK), parse).schema.names)


def list_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the tables that a source names, those of a folder in order of name.

    Raises:
        UsageError: One names nothing, or nothing that is read here.
    """
    found: list[Path] = []
    for each in [source] if isinstance(source, str | Path) else source:
        path = Path(each)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file() and _known(file))
            if not inside:
                raise UsageError(f"{path} holds no table ({', '.join((*SEPARATORS, '.parquet'))})")
            found += inside
        elif not path.is_file():
            raise UsageError(f"no file {path}")
        elif not _known(path):
            raise UsageError(f"{path} is no table ({', '.join((*SEPARATORS, '.parquet'))})")
        else:
            found.append(path)
    return found


def kind_of(path: Path) -> str:
    """Return a file's ending, without that of its packing."""
    return Path(path.stem).suffix.lower() if path.suffix in PACKED else path.suffix.lower()


def _known(path: Path) -> bool:
    # A leading dot or underline: what jobs and readers of folders of parquet pass over.
    return kind_of(path) in (*SEPARATORS, ".parquet") and not path.name.startswith((".", "_"))


def _frame_batches(frame: pd.DataFrame, wanted: Sequence[str]) -> Iterator[Batch]:
    import pyarrow as pa

    check_columns("DataFrame", [str(name) for name in frame.columns], wanted)
    for first in range(0, len(frame), ROWS):
        part = frame.iloc[first : first + ROWS]
        columns = {}
        for name in wanted:
            series = part[name]
            if series.dtype == object:  # text and numbers side by side
                series = series.map(_plain)
            columns[name] = pa.Array.from_pandas(series)
            if isinstance(columns[name], pa.ChunkedArray):
                columns[name] = columns[name].combine_chunks()
        yield Batch("DataFrame", first, columns)


def _plain(value: Any) -> str | None:
    """Return a cell of a mixed column as text, a missing one as None."""
    if value is None or value != value:  # noqa: PLR0124  # NaN
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
