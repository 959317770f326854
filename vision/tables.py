"""CSV and parquet tables of images: paths, bytes, or structs of both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from manyheads.core.errors import DataError, did_you_mean
from manyheads.vision.containers import Container, Files, Index, Names, Packed, opened

CSV = (".csv", ".csv.gz")
PARQUET = (".parquet", ".pq")
SUFFIXES = (*CSV, *PARQUET)


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns; `label` is None where no labels are wanted."""

    image: str
    label: str | None
    id: str

    def check(self, names: Sequence[str], table: str) -> None:
        """Refuse a table without them.

        Raises:
            DataError: The image or the label column is missing.
        """
        for name in (self.image, self.label):
            if name is not None and name not in names:
                have = ", ".join(names[:10])
                raise DataError(f"{table} has no column {name!r}{did_you_mean(name, names)} (it has {have})")

    def texts(self, names: Sequence[str]) -> list[str]:
        """The columns besides the image's that are read."""
        return [name for name in (self.id, self.label) if name is not None and name in names]


def check_ids(ids: Names, table: str) -> None:
    """Refuse ids that do not tell images apart.

    Raises:
        DataError: One is missing, or stands twice.
    """
    if any(each is None for each in ids):
        raise DataError(f"{table}: a row has no id")
    double = ids.double()
    if double is not None:
        raise DataError(f"{table}: the id {double!r} stands twice")


def open_table(path: str, columns: Columns) -> Container:
    """List a table's images.

    Raises:
        DataError: It cannot be read, lacks a column, or has an id twice.
    """
    try:
        return _open_csv(path, columns) if path.lower().endswith(CSV) else _open_parquet(path, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _open_csv(path: str, columns: Columns) -> Files:
    with pyarrow.csv.open_csv(path) as reader:
        names = reader.schema.names
    columns.check(names, path)
    wanted = [columns.image, *columns.texts(names)]
    options = pyarrow.csv.ConvertOptions(
        include_columns=wanted,
        column_types=dict.fromkeys(wanted, pa.large_string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    with pyarrow.csv.open_csv(path, convert_options=options) as reader:
        return _paths(path, _gather(reader, wanted), columns)


def _open_parquet(path: str, columns: Columns) -> Container:
    with opened(path) as file:
        schema, meta = file.schema_arrow, file.metadata
        columns.check(schema.names, path)
        kind = schema.field(columns.image).type
        image = columns.image
        texts = columns.texts(schema.names)
        if pa.types.is_struct(kind):
            fields = [field.name for field in kind]
            packed = "bytes" in fields and not ("path" in fields and _is_empty(meta, f"{image}.bytes"))
            image, kind = (f"{image}.bytes", pa.binary()) if packed else (f"{image}.path", pa.large_string())
            if image.rpartition(".")[2] not in fields:
                raise DataError(f"{path}: the column {columns.image!r} has neither bytes nor path")
        if _is_text(kind):
            found = _gather(file.iter_batches(columns=[image, *texts]), [columns.image, *texts])
            return _paths(path, found, columns)
        if not _is_bytes(kind):
            raise DataError(f"{path}: the column {columns.image!r} holds {kind}, neither paths nor bytes")
        found = _gather(file.iter_batches(columns=texts), texts) if texts else {}
        ids, labels = found.get(columns.id), found.get(columns.label or "")
        if ids is not None:
            check_ids(ids, path)
        groups = accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        return Packed(path, Index(meta.num_rows, None, ids, labels), image, tuple(groups))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_empty(meta: pq.FileMetaData, column: str) -> bool:
    """Tell whether a column has no values, by the file's statistics."""
    for i in range(meta.num_row_groups):
        group = meta.row_group(i)
        for j in range(group.num_columns):
            if group.column(j).path_in_schema == column:
                statistics = group.column(j).statistics
                if statistics is None or statistics.null_count != group.num_rows:
                    return False
    return True


def _gather(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> dict[str, Names]:
    """Collect columns of text, a batch at a time."""
    chunks: dict[str, list[pa.Array]] = {name: [] for name in names}
    for batch in batches:
        for name in names:
            column = batch.column(batch.schema.get_field_index(name))
            column = column.field(0) if pa.types.is_struct(column.type) else column
            text = pc.cast(column, pa.large_string())
            chunks[name].append(pc.cast(text, pa.large_binary()))
    empty = pa.array([], pa.large_binary())
    return {name: Names(pa.concat_arrays(each) if each else empty) for name, each in chunks.items()}


def _paths(path: str, found: dict[str, Names], columns: Columns) -> Files:
    """List the files that a table names."""
    names = found[columns.image]
    ids, labels = found.get(columns.id), found.get(columns.label or "")
    if ids is not None:
        check_ids(ids, path)
    double = names.double() if ids is None else None
    if double is not None:
        raise DataError(f"{path}: {double!r} stands twice; a column {columns.id!r} would tell the rows apart")
    return Files(path, Index(len(names), names, ids, labels), os.path.dirname(path), closed=False)
