"""Columns of tables as numbers that models take: categories, or standardised features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


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
            parts.append(_numbers(column, table, what))
        else:
            hot = torch.nn.functional.one_hot(_categories(column, table, what), column.width)
            parts.append(hot.float())
    return torch.cat(parts, 1)


def fit(
    table: pd.DataFrame, names: Iterable[str], what: str, train: np.ndarray[Any, Any] | None = None
) -> tuple[Column, ...]:
    """Learn columns from a table: text and truth values are categories, numbers are standardised.

    Args:
        table: The rows.
        names: Its columns to learn; columns of lists are many numeric ones.
        what: Names the table in errors.
        train: The rows of the training part; all if None. Other rows' categories are none.

    Raises:
        DataError: A column is not there, is empty, or holds neither text nor numbers.
    """
    part = table if train is None else table.iloc[train]
    return tuple(_fit(part, name, what) for name in names)


def _fit(table: pd.DataFrame, name: str, what: str) -> Column:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    series = _there(table, name, what)
    if series.dropna().empty:
        raise DataError(f"{what}: column {name!r} is empty in the training part")
    if isinstance(series.dropna().iloc[0], (list, tuple, np.ndarray)):
        size = len(series.dropna().iloc[0])
    elif is_numeric_dtype(series) and not is_bool_dtype(series):
        size = 1
    else:
        return Column(name, tuple(sorted(_text(series.dropna()).unique())))
    numbers = _raw(Column(name, size=size), table, what)
    mean, std = np.nanmean(numbers, 0), np.nanstd(numbers, 0)
    std = np.where(std > 1e-12 * np.maximum(1, np.abs(mean)), std, 1.0)  # a constant column stays as it is
    return Column(name, None, tuple(mean.tolist()), tuple(std.tolist()), size)


def _there(table: pd.DataFrame, name: str, what: str) -> pd.Series[Any]:
    if name not in table.columns:
        raise DataError(f"{what}: no column {name!r} (there are {', '.join(map(str, table.columns[:20]))})")
    return table[name]


def _text(series: pd.Series[Any]) -> pd.Series[str]:
    """Values as text; whole numbers stored as 1.0 because of gaps are "1"."""
    from pandas.api.types import is_float_dtype

    if is_float_dtype(series) and bool((series.dropna() % 1 == 0).all()):
        series = series.astype("Int64")
    return series.astype("string").str.strip()


def _categories(column: Column, table: pd.DataFrame, what: str) -> Tensor:
    import pandas as pd

    assert column.categories is not None
    text = _text(_there(table, column.name, what))
    numbers = pd.Index(column.categories).get_indexer(pd.Index(text))
    numbers = np.where(numbers < 0, len(column.categories), numbers)
    return torch.from_numpy(numbers.astype(np.int64))


def _raw(column: Column, table: pd.DataFrame, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers of a column `[rows, size]`, NaN where there is none."""
    import pandas as pd

    if column.size > 1 and column.name not in table.columns:
        names = [f"{column.name}_{i}" for i in range(column.size)]
        _there(table, next((name for name in names if name not in table.columns), names[0]), what)
        block = table[names]
    elif column.size > 1:
        lists = _there(table, column.name, what)
        if (lengths := lists.str.len().dropna()).ne(column.size).any():
            wrong = int(lengths[lengths != column.size].iloc[0])
            raise DataError(f"{what}: column {column.name!r} has {wrong} numbers in a row, not {column.size}")
        empty = np.full(column.size, math.nan)
        return np.stack([row if row is not None else empty for row in lists]).astype(np.float64)
    else:
        block = _there(table, column.name, what).to_frame()
    try:
        return block.apply(pd.to_numeric).to_numpy(np.float64, na_value=math.nan)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what}: column {column.name!r} must be of numbers: {error}") from None


def _numbers(column: Column, table: pd.DataFrame, what: str) -> Tensor:
    """Standardised numbers `[rows, size]`; a gap is the mean."""
    found = _raw(column, table, what)
    if np.isinf(found).any():
        raise DataError(f"{what}: column {column.name!r} has an infinite number")
    if column.mean is not None and column.std is not None:
        found = (found - np.asarray(column.mean)) / np.asarray(column.std)
    return torch.from_numpy(np.nan_to_num(found).astype(np.float32))
