"""What the columns of a table are, and their cells as numbers and timestamps; a bad cell is named by its row.

Everything here works on pyarrow columns: text from CSV, typed from parquet and pandas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, did_you_mean
from manyheads.timeseries.calendar import Times

if TYPE_CHECKING:
    import pyarrow as pa

Missing = Literal["refuse", "mask"]
Where = Callable[[int], str]  # a row's position in the column -> how to name it to the user

TIME_NAMES = ("ds", "date", "datetime", "timestamp", "time")
ID_NAMES = ("unique_id", "item_id", "series_id", "series", "id")
NULLS = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None")

# Year first, so that no day is taken for a month; the clock and the zone may be left out.
_TIME = (
    r"^(?P<Y>\d{4})(?:[-/.]?(?P<m>\d{1,2})(?:[-/.]?(?P<d>\d{1,2}))?)?"
    r"(?:[ T](?P<H>\d{1,2})(?::(?P<M>\d{2})(?::(?P<S>\d{2})(?:\.(?P<f>\d{1,9}))?)?)?)?"
    r" ?(?P<z>Z|UTC|[+-]\d{2}:?\d{2})?$"
)


@dataclass(frozen=True)
class Layout:
    """Which columns a table's time, series id and targets are; without an id column the table is wide."""

    time: str
    id: str | None
    targets: tuple[str, ...]


def _named(name: str, what: str, columns: Sequence[str], source: str) -> str:
    if name not in columns:
        hint = did_you_mean(name, columns)
        raise DataError(f"{source}: no {what} column {name!r}{hint} (columns: {', '.join(columns)})")
    return name


def _usual(names: Sequence[str], what: str, columns: Sequence[str], source: str) -> str | None:
    found = [column for column in columns if column.strip().lower() in names]
    if len(found) > 1:
        raise DataError(
            f"{source}: {' and '.join(map(repr, found))} could each be the {what} column; "
            f"name it with {what}_column"
        )
    return found[0] if found else None


def find_layout(
    columns: Sequence[str],
    source: str,
    time_column: str | None = None,
    id_column: str | None = None,
    targets: Sequence[str] | None = None,
) -> Layout:
    """Find the time, id and target columns by the caller's names, or by the usual ones.

    A wide table's targets are all other columns. A long table's target is its only other column; if there are
    more, the caller names the targets, because covariates would be forecast, or left out, in silence.

    Args:
        columns: The table's column names.
        source: The table's name, for errors.
        time_column: Name of the time column.
        id_column: Name of the id column.
        targets: Names of the target columns.

    Raises:
        DataError: A column is missing, doubled, or not to be told from others.
    """
    doubled = [name for i, name in enumerate(columns) if name in columns[:i]]
    if doubled:
        raise DataError(f"{source}: two columns are named {doubled[0]!r}")
    time = _named(time_column, "time", columns, source) if time_column else None
    time = time or _usual(TIME_NAMES, "time", columns, source)
    if time is None:
        hints = (did_you_mean(name, TIME_NAMES) and name for name in columns)
        like = next((f" (is it {name!r}?)" for name in hints if name), "")
        raise DataError(
            f"{source}: no time column ({', '.join(TIME_NAMES)}) among {', '.join(columns)}{like}; "
            "name it with time_column"
        )
    ident = _named(id_column, "id", columns, source) if id_column else _usual(ID_NAMES, "id", columns, source)
    index = re.compile(r"__index_level_\d+__")  # what pandas calls a nameless index in parquet
    others = tuple(name for name in columns if name not in (time, ident) and not index.fullmatch(name))
    if targets:
        picked = tuple(_named(name, "target", columns, source) for name in targets)
        if set(picked) & {time, ident}:
            raise DataError(f"{source}: the time or id column cannot be a target ({', '.join(picked)})")
    elif "" in others:
        raise DataError(
            f"{source}: a column has no name; write the table without its index, or name the targets"
        )
    elif ident is None or len(others) <= 1:
        picked = others
    else:
        example = "y" if "y" in others else others[0]
        raise DataError(
            f"{source}: {', '.join(others)} are not all plainly targets, and covariates are not read; "
            f'name the columns to forecast, as in targets=["{example}"]'
        )
    if not picked:
        raise DataError(f"{source}: no column to forecast beside {time!r}")
    return Layout(time, ident, picked)


def _is_text(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa

    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _slow_numbers(column: pa.ChunkedArray, name: str, where: Where) -> NDArray[np.float64]:
    """Read text cells one by one, to name the first that is no number."""
    found = np.full(len(column), np.nan)
    for i, text in enumerate(column.to_pylist()):
        if text is None or text.strip() in NULLS:
            continue
        try:
            found[i] = float(text if "_" not in text else "no")
        except ValueError:
            raise DataError(f"{where(i)}, column {name!r}: {text!r} is not a number") from None
    return found


def parse_numbers(column: pa.ChunkedArray, name: str, where: Where) -> NDArray[np.float64]:
    """Return a column's numbers, NaN where a cell is empty.

    Raises:
        DataError: A cell is not a number, or is infinite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_text(column):
        text = pc.utf8_trim_whitespace(column)
        try:
            cells = pc.if_else(pc.is_in(text, value_set=pa.array(NULLS, text.type)), None, text)
            found = pc.cast(cells, pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            found = _slow_numbers(column, name, where)
    else:
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
            raise DataError(
                f"{where(0)}, column {name!r}: {kind} cells are not numbers; leave the column out"
            )
        found = pc.cast(column, pa.float64(), safe=False).to_numpy()
    infinite = np.flatnonzero(np.isinf(found))
    if len(infinite):
        raise DataError(f"{where(int(infinite[0]))}, column {name!r}: infinite value")
    return found


def _zone(zones: pa.Array, where: Where) -> np.timedelta64:
    """Return the one offset from UTC that all rows have."""
    names = np.where(np.isin(zones.to_numpy(zero_copy_only=False), ["Z", "UTC"]), "+0000", zones)
    names = np.char.replace(names.astype(str), ":", "")
    other = np.flatnonzero(names != names[0])
    if len(other):
        i = int(other[0])
        raise DataError(
            f"{where(i)}: mixed time zones, {str(names[i]) or 'none'!r} after {str(names[0]) or 'none'!r}; "
            "write all timestamps in UTC"
        )
    zone = str(names[0]) or "+0000"
    minutes = int(zone[1:3]) * 60 + int(zone[3:5])
    return np.timedelta64(minutes * (-1 if zone[0] == "-" else 1), "m")


def _text_times(text: pa.Array, where: Where) -> Times:
    """Read year-first timestamps by pattern."""
    import pyarrow.compute as pc

    parts = pc.extract_regex(text, pattern=_TIME)
    unread = np.flatnonzero(parts.is_null().to_numpy(zero_copy_only=False))

    def number(key: str, default: str = "0") -> NDArray[np.int64]:
        digits = parts.field("YmdHMSfz".index(key))
        if key == "f":
            digits = pc.utf8_slice_codeunits(pc.utf8_rpad(digits, 6, "0"), 0, 6)
        digits = pc.if_else(pc.equal(pc.fill_null(digits, ""), ""), default, digits)
        return pc.cast(digits, "int64").to_numpy()

    month, day = number("m", "1"), number("d", "1")
    months = ((number("Y", "1970") - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    hour, minute, second = number("H"), number("M"), number("S")
    wrong = (month < 1) | (month > 12) | (days.astype("datetime64[M]") != months)
    wrong |= (hour > 23) | (minute > 59) | (second > 59)
    wrong[unread] = True
    if wrong.any():
        i = int(wrong.argmax())
        raise DataError(
            f"{where(i)}: {text[i].as_py()!r} is not a date; write it year first, as in 2016-12-31 23:00:00"
        )
    micros = ((hour * 60 + minute) * 60 + second) * 10**6 + number("f")
    return days.astype("datetime64[us]") + micros - _zone(pc.fill_null(parts.field(7), ""), where)


def parse_times(column: pa.ChunkedArray, name: str, where: Where) -> Times:
    """Return a column's timestamps, datetime64[us]; those with a zone are turned to UTC.

    Raises:
        DataError: A cell is empty or no date, or time zones are mixed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def named(i: int) -> str:
        return f"{where(i)}, column {name!r}"

    if column.null_count:
        first = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{named(first)}: no timestamp")
    if _is_text(column):
        text = pc.utf8_trim_whitespace(column).combine_chunks()
        try:
            return pc.cast(text, pa.timestamp("us")).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:  # not the plain form: zones, slashes, months without a day
            return _text_times(text, named)
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        raise DataError(
            f"{named(0)}: {column.type} cells are not dates; write them as in 2016-12-31 23:00:00"
        )
    return pc.cast(column, pa.timestamp("us"), safe=False).to_numpy().astype("datetime64[us]")
