"""Columns of a log as numbers: ids as text, times and ratings as what they are, each with what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Mask = NDArray[np.bool_]
Values = NDArray[np.int64] | NDArray[np.float64]


def id_texts(column: pa.Array, name: str) -> tuple[pa.Array, Mask]:
    """Return ids as text, and where there is none.

    Blanks around text are removed. Whole numbers are their digits, also where a column with gaps made them
    floating-point; a fraction counts as missing.

    Raises:
        DataError: The column holds neither text nor numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_floating(kind):
        whole = pc.and_(pc.is_finite(column), pc.equal(pc.floor(column), column))
        column = pc.if_else(whole, column, None).cast(pa.int64())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        return column, _missing(column) | _true(pc.equal(column, ""))
    elif not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(f"column {name!r} holds {kind}, and ids are text or whole numbers")
    return column, _missing(column)


def numbers(column: pa.Array, name: str) -> tuple[Values, Mask]:
    """Return numbers, and where there is none: gaps, text that is no number, NaN and infinity.

    Raises:
        DataError: The column holds neither text nor numbers.
    """
    import pandas as pd
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64), np.ones(len(column), bool)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        if not _is_text(column):
            raise DataError(f"column {name!r} holds {column.type}, not numbers")
        column = _gaps(column)
        for kind in (pa.int64(), pa.float64()):
            try:
                column = column.cast(kind)
                break
            except pa.ArrowInvalid:
                continue
        else:
            column = pa.Array.from_pandas(pd.to_numeric(column.to_pandas(), errors="coerce").astype(float))
    bad = _missing(column)
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False), bad
    values = column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
    return values, bad | ~np.isfinite(values)


class Times:
    """Timestamps of one log: all are numbers, of whatever unit, or all are dates.

    What the first batch mostly holds decides; the rest is bad. Dates become microseconds since 1970, in
    universal time where they name no zone.
    """

    def __init__(self) -> None:
        self.kind: Literal["number", "date"] | None = None

    def __call__(self, column: pa.Array, name: str) -> tuple[Values, Mask]:
        """Return times, and where there is none that can be used."""
        import pyarrow as pa

        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_temporal(column.type):
            return self._agree("date", *_microseconds(column))
        if not _is_text(column):
            return self._agree("number", *numbers(column, name))
        found, bad = numbers(column, name)
        if self.kind != "date" and (self.kind == "number" or not bad.any()):
            return self._agree("number", found, bad)
        dates, none = _parse_dates(_gaps(column))
        if self.kind is None and bad.sum() <= none.sum():
            return self._agree("number", found, bad)
        return self._agree("date", dates, none)

    def _agree(self, kind: Literal["number", "date"], values: Values, bad: Mask) -> tuple[Values, Mask]:
        if self.kind is None and not bad.all():
            self.kind = kind
        return (values, bad) if self.kind in (kind, None) else (values, np.ones_like(bad))


def _microseconds(column: pa.Array) -> tuple[Values, Mask]:
    import pyarrow as pa

    zone = getattr(column.type, "tz", None)
    found = column.cast(pa.timestamp("us", zone), safe=False)
    return found.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False), _missing(column)


def _parse_dates(column: pa.Array) -> tuple[Values, Mask]:
    import pandas as pd
    import pyarrow as pa

    for zone in (None, "UTC"):
        try:
            return _microseconds(column.cast(pa.timestamp("us", zone)))
        except pa.ArrowInvalid:
            continue
    found = pd.to_datetime(column.to_pandas(), errors="coerce", utc=True, format="ISO8601")
    return _microseconds(pa.Array.from_pandas(found))


def _is_text(column: pa.Array) -> bool:
    import pyarrow as pa

    kind = column.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _gaps(column: pa.Array) -> pa.Array:
    """Return text without blanks around it, none where nothing is left."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _missing(column: pa.Array) -> Mask:
    return column.is_null().to_numpy(zero_copy_only=False).astype(bool)


def _true(column: pa.Array) -> Mask:
    return column.fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
