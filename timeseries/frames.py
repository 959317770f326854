"""Tables to series: CSV, parquet and pandas, long or wide, checked row by row.

Long: `unique_id, ds, y` (with several targets: a panel), and covariates. Wide: a date column and numeric
ones, as one series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.core.tables import column_names, stem_of
from manyheads.timeseries import readers, tables
from manyheads.timeseries.calendar import Times, canonical, first_break, infer_freq, usual_freq
from manyheads.timeseries.layout import ColumnNames, Layout, find_layout
from manyheads.timeseries.tables import Cells, Coded, Missing, Where, are_missing

if TYPE_CHECKING:
    import pandas as pd

Rows: TypeAlias = slice | NDArray[np.int64]


@dataclass(frozen=True)
class Series:
    """One series, or several columns forecast jointly, with its covariates.

    Args:
        id: Its id, or a wide file's name.
        ds: Timestamps.
        values: The targets.
        columns: Their names.
        freq: Frequency of the timestamps.
        covariates: The cells of past, future and static columns; a static one has one cell.

    Shape:
        ds `[T]`, datetime64[us]; values `[T, N]`, NaN where missing and masked.
    """

    id: str
    ds: Times
    values: NDArray[np.float64]
    columns: tuple[str, ...]
    freq: str
    covariates: Mapping[str, Cells] = field(default_factory=dict)


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
        raise missing_value(where(int(rows[0])), columns[int(cols[0])])


def missing_value(row: str, column: str) -> DataError:
    """Return the error that a cell is empty, of a row as named to the user."""
    return DataError(f'{row}, column {column!r}: missing value; fill it, or read with missing="mask"')


def history(values: NDArray[np.float64], where: Where) -> int:
    """Return how many rows end with the last one that has a target; those after it are the future.

    Raises:
        DataError: No row has a target.
    """
    seen = np.flatnonzero(~np.isnan(values).all(axis=1))
    if not len(seen):
        raise DataError(f"{where(0)}: this row and those after it, to the series' end, have no target value")
    return int(seen[-1]) + 1


def one_value(cells: Cells, column: str, where: Where) -> Cells:
    """Return a static column's only value, as one cell; empty cells do not count.

    Raises:
        DataError: There are two values; names the rows.
    """
    known = np.flatnonzero(~are_missing(cells))
    numbers = cells.codes if isinstance(cells, Coded) else cells
    if not len(known):
        return cells[:1]
    other = known[numbers[known] != numbers[known[0]]]
    if len(other):
        texts = cells.values if isinstance(cells, Coded) else None
        old, new = (texts[numbers[i]] if texts else float(numbers[i]) for i in (known[0], other[0]))
        raise DataError(
            f"{where(int(other[0]))}, column {column!r}: {new!r}, but {old!r} at {where(int(known[0]))}; "
            "a static column has one value a series"
        )
    return cells[known[:1]]


def series_rows(
    table: readers.Table, column: str | None, stem: str, where: Where
) -> Iterator[tuple[str, Rows]]:
    """Yield each series' id and rows, in order of first appearance.

    Args:
        table: The table.
        column: Its id column; without one it is one series.
        stem: The id of that.
        where: Names a row.

    Raises:
        DataError: A row has no id.
    """
    if column is None:
        yield stem, slice(0, len(table))
        return
    coded = tables.parse_ids(table[column])
    if len(coded) and coded.codes.min() < 0:
        raise DataError(f"{where(int(coded.codes.argmin()))}: no id in column {column!r}")
    begins = np.flatnonzero(coded.codes[1:] != coded.codes[:-1]) + 1
    begins = np.concatenate([np.zeros(min(1, len(coded)), np.int64), begins])
    if len(begins) == len(coded.values):  # each stands together: no index is needed
        for name, first, end in zip(coded.values, begins, [*begins[1:], len(coded)], strict=True):
            yield name, slice(int(first), int(end))
        return
    order = np.argsort(coded.codes, kind="stable")
    bounds = np.searchsorted(coded.codes[order], np.arange(len(coded.values) + 1))
    for k, name in enumerate(coded.values):
        yield name, order[bounds[k] : bounds[k + 1]]


def read(
    source: str | Path | pd.DataFrame,
    *,
    freq: str | None = None,
    missing: Missing = "refuse",
    **named: Unpack[ColumnNames],
) -> list[Series]:
    """Read and check all series of a CSV, a parquet file or a DataFrame.

    Args:
        source: Path or DataFrame. Rows of one series may be anywhere, in time order.
        freq: Frequency; None infers it. All series must keep the same.
        missing: "refuse" a missing value, or "mask" it (it stays empty).
        named: Which columns are what; the usual names need not be said.

    Raises:
        DataError: What is wrong, with the row and column.

    Example:
        >>> read("ETTh1.csv")[0].freq
        'h'
    """
    if isinstance(source, str | Path):
        path = Path(source)
        name, stem = str(path), stem_of(path)
        layout = find_layout(column_names(path), name, **named)
        ids = [layout.id] if layout.id else []
        coded = [*ids, *layout.categorical]
        table, unit = readers.read_table(path, [*ids, *layout.wanted], coded, layout.time)
    else:
        table, unit, name, stem = readers.from_pandas(source), "row", "DataFrame", "data"
        layout = find_layout(table.column_names, name, **named)
    if len(table) == 0:
        raise DataError(f"{name}: a header and no rows")
    first = 2 if unit == "line" else 0

    def where(i: int) -> str:
        return f"{name}, {unit} {first + i}"

    ds = tables.parse_times(table[layout.time], layout.time, where)
    values = [tables.parse_numbers(table[c], c, where) for c in layout.targets]
    cells = {c: tables.parse_cells(table[c], c, where, c in layout.categorical) for c in layout.covariates}
    whole = values[0][:, None] if len(values) == 1 else np.stack(values, axis=1)
    found: list[Series] = []
    places = list(series_rows(table, layout.id, stem, where))
    del values, table
    readers.release()
    for ident, rows in places:
        each = _one(ident, rows, ds, whole, cells, layout, freq, missing, where)
        if found and each.freq != found[0].freq:
            raise DataError(
                f"{name}: series {ident!r} has frequency {each.freq}, {found[0].id!r} has {found[0].freq}; "
                "split them, or give freq"
            )
        found.append(each)
    return found


def _one(
    ident: str,
    rows: Rows,
    ds: Times,
    values: NDArray[np.float64],
    cells: Mapping[str, Cells],
    layout: Layout,
    freq: str | None,
    missing: Missing,
    where: Where,
) -> Series:
    """Check one series, and cut its future off: what is to be forecast is not learnt from."""
    here = _row_namer(rows, ds, where)
    ds, values = ds[rows], values[rows]
    step = check_times(ds, freq, here)
    if layout.future:
        end = history(values, here)
        ds, values = ds[:end], values[:end]
    covariates: dict[str, Cells] = {}
    for name, whole in cells.items():
        mine = whole[rows]
        covariates[name] = one_value(mine, name, here) if name in layout.static else mine[: len(ds)]
    if missing == "refuse":
        check_missing(values, layout.targets, here)
        for name, mine in covariates.items():
            empty = are_missing(mine)
            if empty.any():
                raise missing_value(here(int(empty.argmax())), name)
    return Series(ident, ds, values, layout.targets, step, covariates)


def _row_namer(rows: Rows, ds: Times, where: Where) -> Where:
    def here(i: int) -> str:
        row = rows.start + i if isinstance(rows, slice) else int(rows[i])
        return f"{where(row)} ({ds[row].item()})"

    return here
