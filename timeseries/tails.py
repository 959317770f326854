"""A series' last rows, as far as a model needs them, from a stream; and its future from a second table.

No more is held than the context, the horizon and a block of rows, however long the series is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.tables import column_names
from manyheads.timeseries import readers, tables
from manyheads.timeseries.calendar import Times
from manyheads.timeseries.frames import Rows, check_times, one_value, series_rows
from manyheads.timeseries.layout import Layout
from manyheads.timeseries.tables import Cells, Coded, Where, are_missing

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Tail:
    """A record's last rows, as far as a model needs them.

    Args:
        ds: Timestamps of the context.
        values: The targets there.
        rows: How many rows the history has in all.
        where: Names a row of context and future.
        ahead: Timestamps of the rows after it whose covariates are known.
        cells: The covariates: past ones in the context, future ones there and ahead, static ones in one cell.

    Shape:
        ds `[L]`, values `[L, N]`, ahead `[F]`.
    """

    ds: Times
    values: NDArray[np.float64]
    rows: int
    where: Where
    ahead: Times = field(default_factory=lambda: np.zeros(0, "datetime64[us]"))
    cells: Mapping[str, Cells] = field(default_factory=dict)


def read_tail(
    layout: Layout, blocks: Iterable[pa.Table], where: Where, keep: int, ahead: int, freq: str
) -> Tail:
    """Read a record to its end, and keep its last rows; all timestamps and static columns are checked.

    Args:
        layout: What the columns are.
        blocks: The record's rows.
        where: Names one of its rows.
        keep: Rows of history to keep.
        ahead: Rows of the future to keep, where the layout has future covariates.
        freq: The frequency that timestamps must have.

    Raises:
        DataError: No rows or none with a target, or what is wrong with one of them.
    """
    import pyarrow as pa

    statics: dict[str, tuple[Cells, str]] = {}
    window = recent = None  # the context with what comes after it, and the last rows whatever they hold
    row = begin = rows = 0  # of the record: read so far, in front of the window, of the history
    last = np.zeros(0, "datetime64[us]")
    for block in blocks:
        named = _shifted(where, row)
        times = tables.parse_times(block[layout.time], layout.time, named)
        check_times(np.concatenate([last, times]), freq, _shifted(where, row - len(last)))
        _add_statics(statics, block, layout, named)
        joined = pa.concat_tables([recent, block]) if recent else block
        front, seen = row - (len(joined) - len(block)), _last_target(block, layout)
        if seen is not None:
            rows = row + seen + 1
            begin = max(front, rows - keep)
            window = joined.slice(begin - front, rows - begin + ahead)
        elif window is not None:
            missing = rows - begin + ahead - len(window)
            window = pa.concat_tables([window, block.slice(0, max(0, missing))])
        recent, last, row = joined.slice(max(0, len(joined) - keep)), times[-1:], row + len(block)
    if row == 0:
        raise DataError(f"{where(0)}: a header and no rows")
    if window is None:
        raise DataError(f"{where(0)}: this row and those after it, to the series' end, have no target value")
    return _parse(window, layout, rows, begin, where, {name: cells for name, (cells, _) in statics.items()})


def _parse(
    window: pa.Table, layout: Layout, rows: int, begin: int, where: Where, statics: Mapping[str, Cells]
) -> Tail:
    """Read the cells of the rows that are kept."""
    named, n = _shifted(where, begin), rows - begin
    # Copies, for a view would hold the blocks that the rows came in.
    ds = tables.parse_times(window[layout.time], layout.time, named).copy()
    known = window.slice(0, n)
    values = [tables.parse_numbers(known[c], c, named) for c in layout.targets]
    cells = dict(statics)
    for c in layout.past + layout.future:
        column = (window if c in layout.future else known)[c]
        parsed = tables.parse_cells(column, c, named, c in layout.categorical)
        cells[c] = parsed if isinstance(parsed, Coded) else parsed.copy()
    return Tail(ds[:n], np.stack(values, axis=1), rows, named, ds[n:], cells)


def _last_target(block: pa.Table, layout: Layout) -> int | None:
    """Return the last row of a block that is history: any row, but where the future may follow."""
    if not layout.future:
        return len(block) - 1
    empty = np.logical_and.reduce([tables.are_empty(block[c]) for c in layout.targets])
    seen = np.flatnonzero(~empty)
    return int(seen[-1]) if len(seen) else None


def _add_statics(found: dict[str, tuple[Cells, str]], block: pa.Table, layout: Layout, where: Where) -> None:
    """Take the static columns' values, and refuse a second one."""
    for c in layout.static:
        cells, named = tables.parse_cells(block[c], c, where, c in layout.categorical), where
        if c in found:
            cells, named = tables.join(found[c][0], cells), _after(found[c][1], where)
        one, known = one_value(cells, c, named), np.flatnonzero(~are_missing(cells))
        row = named(int(known[0])) if len(known) else ""
        found[c] = (one if isinstance(one, Coded) else one.copy()), row


def _after(first: str, where: Where) -> Where:
    return lambda i: where(i - 1) if i else first


def _shifted(where: Where, first: int) -> Where:
    return lambda i: where(first + i)


@dataclass(frozen=True)
class Ahead:
    """Future covariates of a second table.

    Args:
        name: The table's name, for errors.
        unit: What its rows are called there: "line" or "row".
        ds: Its timestamps.
        cells: Its future covariates.
        rows: Where each series stands; "" is the only one of a table without ids.
    """

    name: str
    unit: str
    ds: Times
    cells: Mapping[str, Cells]
    rows: Mapping[str, Rows]

    def where(self, row: int) -> str:
        """Name a row to the user."""
        return f"{self.name}, {self.unit} {row + 2 * (self.unit == 'line')}"

    def extend(self, tail: Tail, ident: str, most: int, freq: str) -> Tail:
        """Put a series' rows after its tail.

        Args:
            tail: The tail.
            ident: The series' id.
            most: Rows of the future to keep.
            freq: The frequency that timestamps must have.

        Raises:
            DataError: The rows do not follow on the tail.
        """
        rows = self.rows.get(ident)
        if rows is None:
            return tail
        ds = np.concatenate([tail.ds[-1:], tail.ahead])
        n, before = len(tail.ds) + len(tail.ahead), len(ds)
        at = np.arange(len(self.ds))[rows]

        def where(i: int) -> str:
            return tail.where(i) if i < n else self.where(int(at[i - n]))

        check_times(np.concatenate([ds, self.ds[rows]]), freq, _shifted(where, n - before))
        more = at[: max(0, most - len(tail.ahead))]
        cells = {c: tables.join(tail.cells[c], mine[more]) for c, mine in self.cells.items()}
        ahead = np.concatenate([tail.ahead, self.ds[more]])
        return replace(tail, where=where, ahead=ahead, cells={**tail.cells, **cells})


def open_ahead(source: object, layout: Layout) -> Ahead:
    """Read a table of future covariates, with the columns that the history names so.

    Args:
        source: Path or DataFrame: time, id where the history has one, and the future covariates.
        layout: What the history's columns are.

    Raises:
        DataError: A column is missing, or a cell is wrong.
        UsageError: The source is neither a path nor a DataFrame.
    """
    import pandas as pd

    wanted = [column for column in (layout.id, layout.time, *layout.future) if column]
    if isinstance(source, str | Path):
        name, names = str(source), column_names(Path(source))
    elif isinstance(source, pd.DataFrame):
        table, name, unit = readers.from_pandas(source), "future", "row"
        names = table.column_names
    else:
        raise UsageError("a future is a CSV or parquet path, or a DataFrame")
    lacking = next((column for column in wanted if column not in names), None)
    if lacking:
        hint = did_you_mean(lacking, names)
        raise DataError(f"{name}: no column {lacking!r}{hint} (columns: {', '.join(names)})")
    if isinstance(source, str | Path):
        coded = [column for column in wanted if column == layout.id or column in layout.categorical]
        table, unit = readers.read_table(Path(source), wanted, coded, layout.time)
    empty = Ahead(name, unit, np.zeros(0, "datetime64[us]"), {}, {})
    ds = tables.parse_times(table[layout.time], layout.time, empty.where)
    cells = {c: tables.parse_cells(table[c], c, empty.where, c in layout.categorical) for c in layout.future}
    return replace(empty, ds=ds, cells=cells, rows=dict(series_rows(table, layout.id, "", empty.where)))
