"""What a table says of its images: classes or several labels, groups, parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manyheads.core.errors import DataError, did_you_mean
from manyheads.vision.tables import CSV


def sort_labels(names: Sequence[str], codes: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Sort class names, numbers as such, and renumber the classes with them."""
    numeric = all(name.isdecimal() for name in names)
    order = sorted(range(len(names)), key=lambda i: (int(names[i]), names[i]) if numeric else (0, names[i]))
    new = np.empty(len(names), np.int64)
    new[order] = np.arange(len(names))
    return tuple(names[i] for i in order), new[codes]


class Cells:
    """Some columns of one table, or of several one under the other, as texts.

    Args:
        paths: The tables.
        names: The columns.

    Raises:
        DataError: A table cannot be read, or lacks a column.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str]) -> None:
        self.paths, self.counts = list(paths), []
        chunks: dict[str, list[pa.Array]] = {name: [] for name in names}
        for path in paths:
            table = _read(path, list(dict.fromkeys(names)))
            self.counts.append(table.num_rows)
            for name, each in chunks.items():
                each.extend(_texts(table.column(name), name, path).chunks)
        self._columns = {name: pa.chunked_array(each, pa.large_string()) for name, each in chunks.items()}

    def __len__(self) -> int:
        return sum(self.counts)

    def where(self, row: int) -> str:
        """Say where a row stands: a CSV's line (as if no cell had line breaks), a parquet's row from 0."""
        for path, count in zip(self.paths, self.counts, strict=True):
            if row < count:
                return f"{path}, line {row + 2}" if path.lower().endswith(CSV) else f"{path}, row {row}"
            row -= count
        raise IndexError(row)

    def _codes(self, name: str) -> tuple[list[str], NDArray[np.int64]]:
        """Number the texts of a column by first appearance.

        Raises:
            DataError: A cell is empty.
        """
        column = self._columns[name]
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
        if pc.any(empty).as_py():
            rows = np.flatnonzero(empty.to_numpy())
            raise DataError(
                f"{self.where(int(rows[0]))}: nothing in column {name!r}"
                + (f", and in {len(rows) - 1} more rows" if len(rows) > 1 else "")
            )
        coded = pc.utf8_trim_whitespace(column).dictionary_encode().unify_dictionaries()
        found = coded.chunk(0).dictionary.to_pylist() if coded.num_chunks else []
        parts = [chunk.indices.to_numpy() for chunk in coded.chunks]
        return found, np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def classes(self, name: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Return the class names of a column, sorted, and the class of each row."""
        return sort_labels(*self._codes(name))

    def numbers(self, name: str, classes: int) -> NDArray[np.int64]:
        """Return the class of each row from a column of class numbers.

        Raises:
            DataError: A cell is no class number.
        """
        names, codes = self._codes(name)
        for i, each in enumerate(names):
            if not each.isdecimal() or int(each) >= classes:
                row = int(np.flatnonzero(codes == i)[0])
                raise DataError(f"{self.where(row)}: column {name!r} has {each!r}, not 0 to {classes - 1}")
        return np.array([int(each) for each in names], np.int64)[codes]

    def groups(self, name: str) -> NDArray[np.int64]:
        """Return a number for each row's group."""
        return self._codes(name)[1]

    def parts(self, name: str, part_of: Callable[[str], int | None]) -> NDArray[np.int8]:
        """Return the part that each row names.

        Raises:
            DataError: A cell names none.
        """
        names, codes = self._codes(name)
        found = [part_of(each) for each in names]
        if None in found:
            wrong = found.index(None)
            row = int(np.flatnonzero(codes == wrong)[0])
            raise DataError(
                f"{self.where(row)}: column {name!r} has {names[wrong]!r}; it may have train, val or test"
            )
        return np.array(found, np.int8)[codes]

    def several(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return 0, 1, or NaN (unknown) for each row and label column.

        Shape:
            `[n, K]`.

        Raises:
            DataError: A cell has something else, or a label is nowhere 1 and 0.
        """
        targets = np.empty((len(self), len(names)), np.float32)
        for k, name in enumerate(names):
            column = pc.utf8_lower(pc.utf8_trim_whitespace(self._columns[name]))
            words = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "": np.nan, "nan": np.nan}
            at = pc.index_in(column, pa.array(list(words), pa.large_string())).to_numpy()
            unknown = np.isnan(at) if at.dtype.kind == "f" else np.zeros(len(at), bool)
            wrong = np.flatnonzero(unknown & column.is_valid().to_numpy())
            if len(wrong):
                value = column[int(wrong[0])].as_py()
                raise DataError(
                    f"{self.where(int(wrong[0]))}: column {name!r} has {value!r}; a label is 1, 0, or empty "
                    "where it is unknown"
                )
            values = np.array([*words.values(), np.nan], np.float32)
            targets[:, k] = values[np.where(unknown, len(words), at).astype(np.int64)]
            for value in (0, 1):
                if not (targets[:, k] == value).any():
                    raise DataError(f"{self.paths[0]}: no row has {value} in the label column {name!r}")
        return targets


def _read(path: str, names: list[str]) -> pa.Table:
    try:
        if path.lower().endswith(CSV):
            with pyarrow.csv.open_csv(path) as reader:
                _check(reader.schema.names, names, path)
            options = pyarrow.csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.large_string()),
                strings_can_be_null=True,
                null_values=[""],
            )
            return pyarrow.csv.read_csv(path, convert_options=options)
        _check(pq.read_schema(path).names, names, path)
        return pq.read_table(path, columns=names, partitioning=None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _check(have: Sequence[str], names: Sequence[str], path: str) -> None:
    for name in names:
        if name not in have:
            hint = did_you_mean(name, have)
            raise DataError(f"{path} has no column {name!r}{hint} (it has {', '.join(have[:10])})")


def _texts(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_floating(column.type):  # classes 0.0, 1.0: a column of whole numbers that had gaps
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.fill_null(pc.equal(column, pc.floor(column)), True)).as_py()
        column = pc.cast(column, pa.int64()) if whole else column
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise DataError(f"{path}: column {name!r} holds {column.type}, neither text nor numbers")
    return pc.cast(column, pa.large_string())
