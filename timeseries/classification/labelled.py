"""Series with a label each: from an archive of arrays (the UEA and UCR sets) or from a long table.

A long table has a row a step: an id, channels, and a label that is the same in all rows of an id. Its rows
are taken in their order; the steps need no regular times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, did_you_mean
from manyheads.core.tables import column_names
from manyheads.timeseries import readers, tables
from manyheads.timeseries.layout import ID_NAMES, TIME_NAMES

_MAX_VALUES = 1 << 30  # of an archive's array: 4 GiB of float32


@dataclass(frozen=True)
class Labelled:
    """Series of several channels, and what each is.

    Args:
        ids: A name a series.
        values: The steps of each, NaN where missing.
        labels: The class of each.
        columns: The channels' names.

    Shape:
        values: each `[T, C]`, of any length.
    """

    ids: list[str]
    values: list[NDArray[np.float32]]
    labels: list[str]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> Labelled:
        """Return some of the series."""
        values, labels = [self.values[i] for i in indices], [self.labels[i] for i in indices]
        return Labelled([self.ids[i] for i in indices], values, labels, self.columns)


def read_archive(path: Path) -> tuple[Labelled, Labelled]:
    """Read the train and test part of an `.npz` archive.

    It holds `X_train [n, C, T]`, `y_train [n]`, where lengths differ `len_train [n]`, and the same of test.

    Raises:
        DataError: The file is no such archive; it is not run as code, so objects in it are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            train, test = _archive_part(archive, "train", path), _archive_part(archive, "test", path)
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0][:200]})") from None
    if train.columns != test.columns:
        raise DataError(f"{path}: {len(train.columns)} train channels, but {len(test.columns)} test channels")
    return train, test


def _archive_part(archive: np.lib.npyio.NpzFile, part: str, path: Path) -> Labelled:
    lacking = [key for key in (f"X_{part}", f"y_{part}") if key not in archive.files]
    if lacking:
        raise DataError(f"{path}: no array {lacking[0]} (it has {', '.join(archive.files)})")
    x, y = archive[f"X_{part}"], archive[f"y_{part}"]
    if x.ndim != 3 or x.dtype.kind not in "fiu" or x.size > _MAX_VALUES:
        raise DataError(f"{path}: X_{part} must be numbers [n, channels, time], not {x.dtype} {x.shape}")
    lengths = archive[f"len_{part}"] if f"len_{part}" in archive.files else np.full(len(x), x.shape[2])
    if y.shape != (len(x),) or lengths.shape != (len(x),):
        raise DataError(f"{path}: {len(x)} {part} series, but {len(y)} labels and {len(lengths)} lengths")
    if len(x) == 0 or lengths.min() < 1 or lengths.max() > x.shape[2]:
        raise DataError(f"{path}: a {part} series has no steps, or more than its array")
    values = [each[:, :length].T.astype(np.float32) for each, length in zip(x, lengths, strict=True)]
    columns = tuple(f"channel_{i}" for i in range(x.shape[1]))
    return Labelled([f"{part}-{i}" for i in range(len(x))], values, [str(label) for label in y], columns)


def find_channels(
    names: Sequence[str], source: str, label: str, id_column: str | None, columns: Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Return the id column and the channels of a long table; a usual time column is no channel.

    Raises:
        DataError: There is no such column, or no channel.
    """
    for name in (*([id_column] if id_column else ()), *(columns or ())):
        if name not in names:
            there = ", ".join(names)
            raise DataError(f"{source}: no column {name!r}{did_you_mean(name, names)} (columns: {there})")
    usual = [name for name in names if name.strip().lower() in ID_NAMES]
    if not id_column and len(usual) != 1:
        raise DataError(
            f"{source}: {'no' if not usual else 'more than one'} usual id column; name it with id_column"
        )
    ident = id_column or usual[0]
    others = [n for n in names if n not in (ident, label) and n.strip().lower() not in TIME_NAMES]
    found = tuple(columns or others)
    if not found or label in found or ident in found:
        raise DataError(f"{source}: no channel beside the id {ident!r} and the label {label!r}")
    return ident, found


def read_long(
    path: Path, label_column: str, id_column: str | None = None, columns: Sequence[str] | None = None
) -> Labelled:
    """Read the labelled series of a CSV or parquet file.

    Args:
        path: The file.
        label_column: Holds the label, the same in all rows of a series.
        id_column: Names the series, if not by a usual name.
        columns: The channels; None takes all that is neither id, label nor time.

    Raises:
        DataError: A column is missing, a cell is no number, or a series has two labels or none.
    """
    names = column_names(path)
    if label_column not in names:
        hint = did_you_mean(label_column, names)
        raise DataError(f"{path}: no label column {label_column!r}{hint} (columns: {', '.join(names)})")
    ident, channels = find_channels(names, str(path), label_column, id_column, columns)
    table, unit = readers.read_table(path, [ident, label_column, *channels], [ident, label_column])
    first = 2 if unit == "line" else 0

    def where(i: int) -> str:
        return f"{path}, {unit} {first + i}"

    ids, labels = tables.parse_ids(table[ident]), tables.parse_ids(table[label_column])
    for coded, column in ((ids, ident), (labels, label_column)):
        if len(coded) and coded.codes.min() < 0:
            raise DataError(f"{where(int(coded.codes.argmin()))}: nothing in column {column!r}")
    values = np.stack([tables.parse_numbers(table[c], c, where) for c in channels], axis=1)
    order = np.argsort(ids.codes, kind="stable")
    bounds = np.searchsorted(ids.codes[order], np.arange(len(ids.values) + 1))
    of: list[str] = []
    for k, name in enumerate(ids.values):
        rows = order[bounds[k] : bounds[k + 1]]
        other = rows[labels.codes[rows] != labels.codes[rows[0]]]
        if len(other):
            old, new = (labels.values[labels.codes[i]] for i in (rows[0], other[0]))
            raise DataError(f"{where(int(other[0]))}: series {name!r} has label {new!r}, but {old!r} before")
        of.append(labels.values[labels.codes[rows[0]]])
    parts = [values[order[a:b]].astype(np.float32) for a, b in pairwise(bounds)]
    return Labelled(list(ids.values), parts, of, channels)
