"""Tables to series: CSV, parquet and pandas, long or wide, checked row by row.

Long: `unique_id, ds, y` (with several targets: a panel). Wide: a date column and numeric ones, as one series.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.timeseries import tables
from manyheads.timeseries.calendar import Times, canonical, first_break, infer_freq, usual_freq
from manyheads.timeseries.tables import Layout, Missing, Where

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

CSV_ENDINGS = (".csv", ".csv.gz", ".txt", ".txt.gz")
PARQUET_ENDINGS = (".parquet", ".pq")


@dataclass(frozen=True)
class Series:
    """One series, or several columns forecast jointly.

    Shape:
        ds `[T]`, datetime64[us]; values `[T, N]`, NaN where missing and masked.
    """

    id: str
    ds: Times
    values: NDArray[np.float64]
    columns: tuple[str, ...]
    freq: str


def kind_of(path: Path) -> str:
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


def read_table(path: Path) -> tuple[pa.Table, str]:
    """Read a whole file; returns its table, and "line" or "row" as its rows are to be named.

    Raises:
        DataError: The file cannot be read.
    """
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of(path) == "parquet":
            return pq.read_table(path), "row"
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0][:200]})") from None
    data = data.rstrip(b"\r\n")
    if not data:
        raise DataError(f"{path}: empty file")
    names, _, rows = csv_header(data, str(path)), *data.partition(b"\n")[1:]
    if not rows:
        raise DataError(f"{path}: a header and no rows")
    return parse_csv(rows, str(path), names), "line"


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


def check_times(ds: Times, freq: str | None, where: Where) -> str:
    """Check that timestamps rise by one frequency, and return it.

    Args:
        ds: Timestamps of one series.
        freq: The frequency to keep; None infers it.
        where: Names a row.

    Raises:
        DataError: Unsorted, doubled, a gap, another frequency, or too few rows to tell.
    """
    steps = np.diff(ds)
    back = np.flatnonzero(steps <= np.timedelta64(0, "us"))
    if len(back):
        i = int(back[0]) + 1
        what = (
            "is there twice"
            if ds[i] == ds[i - 1]
            else f"comes after {ds[i - 1].item()}; sort each series by time"
        )
        raise DataError(f"{where(i)}: {ds[i].item()} {what}")
    found = canonical(freq) if freq else infer_freq(ds)
    if found is None and len(ds) < 3:
        raise DataError(f"{where(0)}: {len(ds)} rows do not show a frequency; give freq")
    usual = found or usual_freq(ds)
    broken = first_break(ds, usual) if usual else 1
    if broken is not None:
        raise DataError(
            f"{where(broken)}: {ds[broken].item()} is not one step ({usual or 'any frequency'}) after "
            f"{ds[broken - 1].item()}; fill the gap with empty cells, or give another freq"
        )
    return cast(str, usual)


def check_missing(values: NDArray[np.float64], columns: Sequence[str], where: Where) -> None:
    """Refuse missing values.

    Raises:
        DataError: A value is missing; names the row and column.
    """
    rows, cols = np.nonzero(np.isnan(values))
    if len(rows):
        i, j = int(rows[0]), int(cols[0])
        raise DataError(
            f'{where(i)}, column {columns[j]!r}: missing value; fill it, or read with missing="mask"'
        )


def _series_rows(
    table: pa.Table, layout: Layout, stem: str, where: Where
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield each series' id and rows, in order of first appearance."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if layout.id is None:
        yield stem, np.arange(len(table))
        return
    ids = pc.cast(table[layout.id], pa.large_string())
    empty = np.flatnonzero(pc.or_kleene(ids.is_null(), pc.equal(ids, "")).to_numpy())
    if len(empty):
        raise DataError(f"{where(int(empty[0]))}: no id in column {layout.id!r}")
    coded = ids.combine_chunks().dictionary_encode()
    codes = coded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(coded.dictionary) + 1))
    for k, name in enumerate(coded.dictionary.to_pylist()):
        yield name, order[bounds[k] : bounds[k + 1]]


def read(
    source: str | Path | pd.DataFrame,
    *,
    time_column: str | None = None,
    id_column: str | None = None,
    targets: Sequence[str] | None = None,
    freq: str | None = None,
    missing: Missing = "refuse",
) -> list[Series]:
    """Read and check all series of a CSV, a parquet file or a DataFrame.

    Args:
        source: Path or DataFrame. Rows of one series may be anywhere, in time order.
        time_column: Name of the time column, if not a usual one (`ds, date, datetime, timestamp, time`).
        id_column: Name of the id column of a long table, if not a usual one (`unique_id, item_id, ...`).
        targets: The columns to forecast.
        freq: Frequency; None infers it. All series must keep the same.
        missing: "refuse" a missing value, or "mask" it (it stays NaN).

    Raises:
        DataError: What is wrong, with the row and column.

    Example:
        >>> read("ETTh1.csv")[0].freq
        'h'
    """
    if isinstance(source, str | Path):
        path = Path(source)
        (table, unit), name, stem = read_table(path), str(path), stem_of(path)
    else:
        table, unit, name, stem = from_pandas(source), "row", "DataFrame", "data"
    layout = tables.find_layout(table.column_names, name, time_column, id_column, targets)
    if len(table) == 0:
        raise DataError(f"{name}: a header and no rows")
    first = 2 if unit == "line" else 0

    def where(i: int) -> str:
        return f"{name}, {unit} {first + i}"

    ds = tables.parse_times(table[layout.time], layout.time, where)
    values = np.stack([tables.parse_numbers(table[c], c, where) for c in layout.targets], axis=1)
    found: list[Series] = []
    for ident, rows in _series_rows(table, layout, stem, where):
        here = _row_namer(rows, ds, where)
        step = check_times(ds[rows], freq, here)
        if found and step != found[0].freq:
            raise DataError(
                f"{name}: series {ident!r} has frequency {step}, {found[0].id!r} has {found[0].freq}; "
                "split them, or give freq"
            )
        if missing == "refuse":
            check_missing(values[rows], layout.targets, here)
        found.append(Series(ident, ds[rows], values[rows], layout.targets, step))
    return found


def _row_namer(rows: NDArray[np.int64], ds: Times, where: Where) -> Where:
    def here(i: int) -> str:
        return f"{where(int(rows[i]))} ({ds[rows[i]].item()})"

    return here
