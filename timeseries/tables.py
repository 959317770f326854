"""The cells of a table's columns as numbers, categories and timestamps; a bad cell is named by its row.

Everything here works on pyarrow columns: text from CSV, typed from parquet and pandas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError
from manyheads.timeseries.calendar import Times

if TYPE_CHECKING:
    import pyarrow as pa

Missing = Literal["refuse", "mask"]
Where = Callable[[int], str]  # a row's position in the column -> how to name it to the user

NO_CATEGORY = ("", "nan", "NaN")  # not NA or None, which may well be categories
NULLS = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None")

# Year first, so that no day is taken for a month; the clock and the zone may be left out.
_TIME = (
    r"^(?P<Y>\d{4})(?:[-/.]?(?P<m>\d{1,2})(?:[-/.]?(?P<d>\d{1,2}))?)?"
    r"(?:[ T](?P<H>\d{1,2})(?::(?P<M>\d{2})(?::(?P<S>\d{2})(?:\.(?P<f>\d{1,9}))?)?)?)?"
    r" ?(?P<z>Z|UTC|[+-]\d{2}:?\d{2})?$"
)


@dataclass(frozen=True)
class Coded:
    """Cells of a categorical column: numbers of its values.

    Shape:
        codes `[T]`, -1 where a cell is empty.
    """

    codes: NDArray[np.int32]
    values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Coded:
        return Coded(self.codes[rows], self.values)


Cells: TypeAlias = NDArray[np.float64] | Coded  # numbers, NaN where a cell is empty, or categories


def are_missing(cells: Cells) -> NDArray[np.bool_]:
    """Return which cells are empty.

    Shape:
        `[T]`.
    """
    return cells.codes < 0 if isinstance(cells, Coded) else np.isnan(cells)


def join(first: Cells, second: Cells) -> Cells:
    """Put cells of one column under others of it."""
    if isinstance(first, Coded) and isinstance(second, Coded):
        values = tuple(dict.fromkeys(first.values + second.values))
        codes = np.array([*(values.index(value) for value in second.values), -1], np.int32)
        return Coded(np.concatenate([first.codes, codes[second.codes]]), values)
    assert not isinstance(first, Coded)
    assert not isinstance(second, Coded)
    return np.concatenate([first, second])


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


def plain_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return texts as numbers; raises pyarrow's ArrowInvalid where one is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.utf8_trim_whitespace(column)
    return pc.cast(pc.if_else(pc.is_in(text, value_set=pa.array(NULLS, text.type)), None, text), pa.float64())


def plain_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return texts as timestamps; raises pyarrow's ArrowInvalid where one has not the plain form."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.cast(pc.utf8_trim_whitespace(column), pa.timestamp("us"))


def parse_numbers(column: pa.ChunkedArray, name: str, where: Where) -> NDArray[np.float64]:
    """Return a column's numbers, NaN where a cell is empty.

    Raises:
        DataError: A cell is not a number, or is infinite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_text(column):
        try:
            found = plain_numbers(column).to_numpy()
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


def _coded(column: pa.ChunkedArray, clean: Callable[[str], str]) -> Coded:
    """Code a column's texts; what is cleaned to nothing is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    coded = column.unify_dictionaries().combine_chunks()
    texts = [clean(text or "") for text in pc.cast(coded.dictionary, pa.large_string()).to_pylist()]
    values = tuple(text for text in dict.fromkeys(texts) if text)
    if list(values) == texts:
        return Coded(coded.indices.fill_null(-1).to_numpy().astype(np.int32, copy=False), values)
    number = {text: i for i, text in enumerate(values)}
    codes = np.array([*(number.get(text, -1) for text in texts), -1], np.int32)  # the last one is for null
    return Coded(codes[coded.indices.fill_null(len(texts)).to_numpy()], values)


def parse_ids(column: pa.ChunkedArray) -> Coded:
    """Return a column's ids: its texts, or its numbers as texts."""
    return _coded(column, str)


def parse_categories(column: pa.ChunkedArray) -> Coded:
    """Return a column's categories: its texts without outer spaces, or its numbers and truths as texts."""
    return _coded(column, lambda text: "" if text.strip() in NO_CATEGORY else text.strip())


def parse_cells(column: pa.ChunkedArray, name: str, where: Where, categorical: bool) -> Cells:
    """Return a covariate's cells; truths among numbers are 0 and 1.

    Raises:
        DataError: A cell is not a number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if categorical:
        return parse_categories(column)
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.uint8())
    return parse_numbers(column, name, where)


def are_empty(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Return which cells hold nothing, whatever the others hold.

    Shape:
        `[T]`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_text(column):
        nothing = pc.is_in(pc.utf8_trim_whitespace(column), value_set=pa.array(NULLS, column.type))
        return pc.or_(nothing, column.is_null()).to_numpy()
    return column.is_null(nan_is_null=pa.types.is_floating(column.type)).to_numpy()


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
        try:
            return plain_times(column).to_numpy()
        except pa.ArrowInvalid:  # zones, slashes, months without a day
            return _text_times(pc.utf8_trim_whitespace(column).combine_chunks(), named)
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        raise DataError(
            f"{named(0)}: {column.type} cells are not dates; write them as in 2016-12-31 23:00:00"
        )
    return pc.cast(column, pa.timestamp("us"), safe=False).to_numpy().astype("datetime64[us]", copy=False)
