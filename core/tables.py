"""CSV and parquet files by their rows, in bounded memory; what cannot be read is named by its line."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

import numpy as np

from manyheads.core.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

CSV_ENDINGS = (".csv", ".csv.gz", ".txt", ".txt.gz")
PARQUET_ENDINGS = (".parquet", ".pq")
HEADER = 1 << 20  # bytes that a header may have
BLOCK = 8 << 20  # bytes of CSV held at a time
BATCH = 1 << 14  # rows of parquet held at a time


def kind_of(path: Path) -> Literal["csv", "parquet"]:
    """Return "csv" or "parquet" by a file's ending.

    Raises:
        DataError: No such file, a folder, an empty file, or another ending.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'a folder; name its files' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty file")
    name = path.name.lower()
    if not name.endswith(CSV_ENDINGS + PARQUET_ENDINGS):
        raise DataError(f"{path}: not a {', '.join(CSV_ENDINGS[:2])} or {PARQUET_ENDINGS[0]} file")
    return "csv" if name.endswith(CSV_ENDINGS) else "parquet"


def stem_of(path: Path) -> str:
    """Return a file's name without its endings: "ETTh1" for "ETTh1.csv.gz"."""
    name = path.name
    for ending in (".gz", ".csv", ".txt", *PARQUET_ENDINGS):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


def parse_csv(
    data: bytes, source: str, names: Sequence[str], wanted: Sequence[str] = (), first_line: int = 2
) -> pa.Table:
    """Parse CSV rows (no header) into text columns.

    Args:
        data: The rows' bytes.
        source: The file's name, for errors.
        names: The columns' names.
        wanted: The columns to keep; none means all.
        first_line: Line of the first row in the file.

    Raises:
        DataError: A row has another number of cells, or the bytes are not UTF-8.
    """
    import pyarrow as pa
    from pyarrow import csv

    try:
        return csv.read_csv(
            pa.BufferReader(data),
            csv.ReadOptions(use_threads=False, column_names=list(names)),
            csv.ParseOptions(ignore_empty_lines=False),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=list(wanted),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        text = re.sub(
            r"Row #(\d+)", lambda m: f"line {int(m[1]) + first_line - 1}", str(error).splitlines()[0]
        )
        raise DataError(f"{source}: {text[:200]}") from None


def csv_header(data: bytes, source: str) -> list[str]:
    """Return the column names of a CSV's first line.

    Raises:
        DataError: No header, or cells not parted by commas.
    """
    import csv

    try:
        line = data[: data.find(b"\n") if b"\n" in data else len(data)].decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        raise DataError(f"{source}: not UTF-8 text") from None
    names = [name.strip() for name in next(csv.reader([line]), [])]
    if len(names) == 1 and (";" in line or "\t" in line):
        raise DataError(
            f"{source}: cells are parted by {';' if ';' in line else 'tabs'}; write them with commas"
        )
    return names


def column_names(path: Path) -> list[str]:
    """Return a file's column names.

    Raises:
        DataError: The file cannot be read, or is empty.
    """
    import pyarrow.parquet as pq

    with refusing_broken(path):
        if kind_of(path) == "parquet":
            return list(pq.read_schema(path).names)
        with open_csv(path) as stream:
            line = stream.readline(HEADER)
    if not line.strip():
        raise DataError(f"{path}: empty file")
    return csv_header(line, str(path))


@contextmanager
def open_csv(path: Path) -> Iterator[IO[bytes]]:
    """Open a CSV; a seek forward in a gzip file reads what lies between, which costs time but no memory."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        yield cast("IO[bytes]", stream)


@contextmanager
def refusing_broken(name: str | Path) -> Iterator[None]:
    """Turn the errors of a broken file into one line that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise DataError(f"{name}: cannot be read ({str(error).splitlines()[0][:200]})") from None


def line_blocks(stream: IO[bytes], size: int, end: int | None = None) -> Iterator[bytes]:
    """Yield blocks of whole lines from where a stream stands; empty lines at the end are left out.

    Args:
        stream: A CSV behind its header, or at the beginning of a line.
        size: Bytes to read at a time.
        end: Where to stop; None for the stream's end.
    """
    held, left = b"", end - stream.tell() if end is not None else None
    while data := stream.read(size if left is None else min(size, left)):
        left = None if left is None else left - len(data)
        held += data
        cut = held.find(b"\n", len(held.rstrip(b"\r\n"))) + 1  # after the last line that has text
        if cut == 0 or not held[:cut].strip(b"\r\n"):
            cut = held.rfind(b"\n", 0, len(held.rstrip(b"\r\n"))) + 1
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held.strip(b"\r\n"):
        yield held


@dataclass(frozen=True)
class Rows:
    """Where a stretch of a file's rows lies: rows from `first` on, in a CSV also bytes.

    Args:
        path: The file.
        first: The first row, counted from 0.
        count: How many.
        bytes: Where their lines begin and end, in a CSV, unpacked.
    """

    path: str
    first: int
    count: int
    bytes: tuple[int, int] = (0, 0)

    def where(self, row: int) -> str:
        """Name one of the rows to the user: the line of a CSV, else the row counted from 0."""
        number = self.first + row
        return f"line {number + 2}" if self.bytes[1] else f"row {number}"


def cut(path: Path, size: int) -> list[Rows]:
    """Cut a file into stretches of `size` rows; a CSV is read once, of parquet the footer alone.

    Raises:
        DataError: The file cannot be read, or a CSV has line breaks in cells.
    """
    import pyarrow.parquet as pq

    with refusing_broken(path):
        if kind_of(path) == "parquet":
            total = pq.read_metadata(path).num_rows
            return [Rows(str(path), first, min(size, total - first)) for first in range(0, total, size)]
        return list(_cut_csv(path, size))


def _cut_csv(path: Path, size: int) -> Iterator[Rows]:
    names, row, first, start = column_names(path), 0, 0, 0
    with open_csv(path) as stream:
        stream.readline()
        start = byte = stream.tell()
        for block in line_blocks(stream, BLOCK):
            count = len(parse_csv(block, str(path), names, names[:1], row + 2))
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
            if len(ends) + (not block.endswith(b"\n")) != count:
                raise DataError(
                    f"{path}, line {row + 2} or below: a quoted cell holds a line break; take it out"
                )
            starts = [0, *ends]  # of the block's lines
            for number in range(first + size, row + count, size):  # rows that begin a stretch
                end = byte + int(starts[number - row])
                yield Rows(str(path), first, size, (start, end))
                first, start = number, end
            row, byte = row + count, byte + len(block)
    if row > first:
        yield Rows(str(path), first, row - first, (start, byte))


def read_rows(rows: Rows, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of a stretch, some rows at a time; a CSV's cells are text.

    Raises:
        DataError: The file cannot be read, or has not got a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, names = Path(rows.path), column_names(Path(rows.path))
    check_columns(rows.path, names, columns)
    with refusing_broken(path):
        if kind_of(path) == "csv":
            row = rows.first
            with open_csv(path) as stream:
                stream.seek(rows.bytes[0])
                for block in _stretch(stream, rows.bytes[1] - rows.bytes[0]):
                    table = parse_csv(block, rows.path, names, columns, row + 2)
                    row += len(table)
                    yield table
            return
        with pq.ParquetFile(path) as file:
            ends = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            stop = rows.first + rows.count
            groups = [i for i in range(len(ends) - 1) if ends[i] < stop and ends[i + 1] > rows.first]
            row = int(ends[groups[0]]) if groups else 0
            for batch in file.iter_batches(BATCH, groups, list(columns), use_threads=False):
                low, high = max(rows.first, row), min(stop, row + len(batch))
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low - row, high - low)])
                row += len(batch)


def _stretch(stream: IO[bytes], left: int) -> Iterator[bytes]:
    """Yield blocks of whole lines, empty ones too: each is a row."""
    held = b""
    while left:
        data = stream.read(min(BLOCK, left))
        if not data:
            raise EOFError("it has become shorter")
        left -= len(data)
        held += data
        end = held.rfind(b"\n") + 1 if left else len(held)
        if end:
            yield held[:end]
            held = held[end:]


def check_columns(source: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a table without some columns.

    Raises:
        DataError: Says which, and which there are.
    """
    for name in wanted:
        if name not in names:
            has = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
            raise DataError(f"{source} has no column {name!r}{did_you_mean(name, names)} (it has: {has})")
        if list(names).count(name) > 1:
            raise DataError(f"{source} has two columns {name!r}")
