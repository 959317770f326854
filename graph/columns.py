"""Columns of tables as numbers that models take: categories, or standardised features."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.core.tables import CSV_ENDINGS, check_columns

if TYPE_CHECKING:
    import pandas as pd

MOST_CATEGORIES = 4096  # of a column: more are names, or texts, of which nothing is learnt
Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Column:
    """One column of a table of nodes or edges, or several numeric ones that belong together.

    Args:
        name: The column; `size` numeric ones are `name_0`, `name_1`, ..., or one column of lists in parquet.
        categories: What a categorical column holds, as text; the number behind the last is for all else.
        mean, std: Of a numeric column in the training part; each number becomes (number - mean) / std.
        size: How many numeric columns there are.
    """

    name: str
    categories: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int = 1

    @property
    def width(self) -> int:
        """Features that it becomes beside numeric columns: one for each category, and one for all else."""
        return self.size if self.categories is None else len(self.categories) + 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values, those that say something."""
        found: dict[str, Any] = {"name": self.name}
        for key in ("categories", "mean", "std"):
            if (value := getattr(self, key)) is not None:
                found[key] = list(value)
        return found | ({"size": self.size} if self.size > 1 else {})

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Column:
        """Read it back."""
        lists = {k: tuple(found[k]) for k in ("categories", "mean", "std") if found.get(k) is not None}
        return cls(found["name"], size=found.get("size", 1), **lists)


def categorical(columns: Sequence[Column]) -> bool:
    """Whether all are categories: then models embed each; else all become features."""
    return all(column.categories is not None for column in columns)


def types(columns: Sequence[Column]) -> tuple[list[int] | None, int]:
    """Return the categories of each column, or the number of features; without columns one category."""
    if categorical(columns):
        return [column.width for column in columns] or [1], 0
    return None, sum(column.width for column in columns)


def values(columns: Sequence[Column], table: pd.DataFrame, what: str) -> Tensor:
    """Turn the rows of a table into what models take.

    Args:
        columns: The columns, as fitted.
        table: Has them all, and may have others.
        what: Names the table in errors: "nodes", "edges".

    Shape:
        The result int64 `[rows, columns]` where all are categorical, `[rows, 1]` zeros without columns, else
        float32 `[rows, features]`.

    Raises:
        DataError: A column is not there, or not of numbers.
    """
    if categorical(columns):
        if not columns:
            return torch.zeros(len(table), 1, dtype=torch.int64)
        return torch.stack([_categories(column, table, what) for column in columns], 1)
    parts = []
    for column in columns:
        if column.categories is None:
            parts.append(_standardised(column, table, what))
        else:
            hot = torch.nn.functional.one_hot(_categories(column, table, what), column.width)
            parts.append(hot.float())
    return torch.cat(parts, 1)


def fit(
    table: pd.DataFrame,
    names: Iterable[str],
    what: str,
    train: np.ndarray[Any, Any] | None = None,
    categories: Collection[str] = (),
) -> tuple[Column, ...]:
    """Learn columns from a table: numbers are standardised, text and truth values are categories.

    Args:
        table: The rows.
        names: Its columns to learn; columns of lists are many numeric ones.
        what: Names the table in errors.
        train: The rows of the training part; all if None. Categories of other rows alone are none.
        categories: Columns whose numbers are categories.

    Raises:
        DataError: A column is not there, is empty, or has too many different texts.
    """
    part = table if train is None else table.iloc[train]
    return tuple(_fit(part, name, what, name in categories) for name in names)


def _fit(table: pd.DataFrame, name: str, what: str, category: bool) -> Column:
    from pandas.api.types import is_bool_dtype

    series = _there(table, name, what)
    known = series.dropna()
    if known.empty:
        raise DataError(f"{what}: column {name!r} is empty in the training part")
    first = known.iloc[0]
    column = Column(name, size=len(first) if isinstance(first, (list, tuple, np.ndarray)) else 1)
    try:
        if category or is_bool_dtype(series):
            raise ValueError
        found = _raw(column, table, what) if column.size > 1 else _parsed(series)[:, None]
    except ValueError:
        kinds = sorted(text_of(table, name, what).dropna().unique())
        if len(kinds) > MOST_CATEGORIES:
            raise DataError(
                f"{what}: column {name!r} has {len(kinds)} different texts, and categories are at most "
                f"{MOST_CATEGORIES}; leave it out of the columns that are read"
            ) from None
        return Column(name, tuple(kinds))
    _refuse_infinite(found, name, what)
    mean, std = np.nanmean(found, 0), np.nanstd(found, 0)
    std = np.where(std > 1e-12 * np.maximum(1, np.abs(mean)), std, 1.0)  # a constant column stays as it is
    return Column(name, None, tuple(mean.tolist()), tuple(std.tolist()), column.size)


def _there(table: pd.DataFrame, name: str, what: str) -> pd.Series[Any]:
    check_columns(what, [str(each) for each in table.columns], [name])
    return table[name]


def place(what: str, row: int) -> str:
    """Name a row of a table to the user: the line of a CSV, else the row counted from 0."""
    return f"{what}, line {row + 2}" if what.lower().endswith(CSV_ENDINGS) else f"{what}, row {row}"


def text_of(table: pd.DataFrame, name: str, what: str) -> pd.Series[str]:
    """Return a column as text without blanks around it, gaps as such; 1.0 is "1", truth is "true".

    Raises:
        DataError: The column is not there.
    """
    from pandas.api.types import is_bool_dtype, is_float_dtype

    series = _there(table, name, what)
    if is_float_dtype(series) and bool((series.dropna() % 1 == 0).all()):
        series = series.astype("Int64")
    truth = is_bool_dtype(series)
    text = series.astype("string").str.strip()
    return text.str.lower() if truth else text.mask(text == "")


def numbers(table: pd.DataFrame, name: str, what: str, size: int = 1) -> Numbers:
    """Return a column, or several that belong together, as numbers `[rows, size]`, NaN where there is none.

    Raises:
        DataError: The column is not there, or not of finite numbers.
    """
    found = _raw(Column(name, size=size), table, what)
    _refuse_infinite(found, name, what)
    return found


def _refuse_infinite(found: Numbers, name: str, what: str) -> None:
    if np.isinf(found).any():
        raise DataError(f"{what}: column {name!r} has an infinite number")


def _categories(column: Column, table: pd.DataFrame, what: str) -> Tensor:
    import pandas as pd

    assert column.categories is not None
    text = text_of(table, column.name, what)
    found = pd.Index(column.categories).get_indexer(pd.Index(text))
    found = np.where(found < 0, len(column.categories), found)
    return torch.from_numpy(found.astype(np.int64))


def _raw(column: Column, table: pd.DataFrame, what: str) -> Numbers:
    if column.size > 1 and column.name in table.columns:
        lists = table[column.name]
        if (lengths := lists.dropna().map(len)).ne(column.size).any():
            wrong = int(lengths[lengths != column.size].iloc[0])
            raise DataError(f"{what}: column {column.name!r} has {wrong} numbers in a row, not {column.size}")
        gap = np.full(column.size, math.nan)
        rows = [gap if missing else row for row, missing in zip(lists, lists.isna(), strict=True)]
        return np.stack(rows).astype(np.float64) if rows else np.empty((0, column.size))
    names = [column.name] if column.size == 1 else [f"{column.name}_{i}" for i in range(column.size)]
    found = np.empty((len(table), column.size))
    for i, name in enumerate(names):
        try:
            found[:, i] = _parsed(_there(table, name, what))
        except ValueError as error:
            raise DataError(f"{what}: column {name!r} must be of numbers: {error}") from None
    return found


def _parsed(series: pd.Series[Any]) -> Numbers:
    """Numbers `[rows]`, NaN in gaps; raises ValueError where a cell is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = pa.array(series, from_pandas=True)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = pc.utf8_trim_whitespace(array)
        array = pc.if_else(pc.equal(array, ""), None, array)
    try:
        return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _standardised(column: Column, table: pd.DataFrame, what: str) -> Tensor:
    """Features `[rows, size]`; a gap is the mean."""
    found = numbers(table, column.name, what, column.size)
    if column.mean is not None and column.std is not None:
        found = (found - np.asarray(column.mean)) / np.asarray(column.std)
    return torch.from_numpy(np.nan_to_num(found).astype(np.float32))
