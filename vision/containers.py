"""What holds images: a folder's files, a table's cells, an archive's members.

Each container lists its images without decoding any, streams a range in order, and reads single ones in any
order. Nothing stays open in it, so that it can be sent to other processes; names lie in arrow arrays, some 40
bytes an image instead of the 150 of Python's.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from manyheads.core.errors import BadRecord, DataError
from manyheads.vision.images import MAX_BYTES

Data: TypeAlias = bytes | Path
CELLS = 16  # of a table, read at a time
BUFFER = 1 << 20  # bytes of a column read at a time: a row group is never held whole when streamed


class Names:
    """Texts in an arrow array; the bytes of file names, which may be no UTF-8, are kept."""

    def __init__(self, values: Iterable[str | None] | pa.Array) -> None:
        if not isinstance(values, pa.Array):
            encoded = [None if v is None else v.encode("utf-8", "surrogateescape") for v in values]
            values = pa.array(encoded, pa.large_binary())
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> str | None:
        value = self._values[index].as_py()
        return None if value is None else value.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str | None]:
        return (self[i] for i in range(len(self)))

    def cut(self, start: int, stop: int) -> Names:
        """Return a range, with no memory of the rest."""
        return Names(pa.array(self._values[start:stop].to_pylist(), pa.large_binary()))

    def double(self) -> str | None:
        """Return a text that stands here twice."""
        seen: set[bytes] = set()
        for value in self._values.drop_null().to_pylist():
            if value in seen:
                return value.decode("utf-8", "backslashreplace")
            seen.add(value)
        return None


@dataclass(frozen=True)
class Index:
    """Names, ids and labels of a container's images.

    Args:
        count: How many there are.
        names: Paths; without them, images are known by the number of their row.
        ids: Ids where they are not the names.
        labels: Labels.
        by_folder: The label is the first folder of the name.
        first: The number of the first row.
    """

    count: int
    names: Names | None = None
    ids: Names | None = None
    labels: Names | None = None
    by_folder: bool = False
    first: int = 0

    def id(self, index: int) -> str:
        """Return an id; bytes of a file name that are no text come as backslash and number."""
        names = self.ids if self.ids is not None else self.names
        found = names[index] if names is not None else None
        if found is None:
            return str(self.first + index)
        found = found.removeprefix("./")  # as tar writes them
        return found.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def place(self, index: int) -> str | int:
        """Return the name, or the row's number."""
        name = self.names[index] if self.names is not None else None
        return self.first + index if name is None else name

    def label(self, index: int) -> str | None:
        """Return the label, if there is one."""
        if self.by_folder:
            folder, slash, _ = self.id(index).partition("/")
            return folder if slash else None
        return self.labels[index] if self.labels is not None else None

    def cut(self, start: int, stop: int) -> Index:
        """Return a range."""
        names, ids, labels = (
            each.cut(start, stop) if each is not None else None
            for each in (self.names, self.ids, self.labels)
        )
        return Index(stop - start, names, ids, labels, self.by_folder, self.first + start)


class Container(Protocol):
    """Images with an index; `place` and `read` go by the position in it."""

    @property
    def name(self) -> str:
        """The path of what holds the images."""

    @property
    def index(self) -> Index:
        """What the images are called."""

    def cut(self, start: int, stop: int) -> Container:
        """Return a range."""

    def read(self, index: int) -> Data:
        """Return one image, encoded; raises BadRecord where there is none."""

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield a range's images in order."""


def one_by_one(container: Container, start: int, stop: int) -> Iterator[Data | BadRecord]:
    """Stream where places are cheap to go to."""
    for index in range(start, stop):
        try:
            yield container.read(index)
        except BadRecord as error:
            yield error


@dataclass(frozen=True)
class Files:
    """Files below a folder.

    Args:
        name: The folder, or the table that names the files.
        index: Their paths.
        base: What relative paths are relative to.
        closed: A link may not lead out of the folder; a table names its user's own files, wherever they are.
    """

    name: str
    index: Index
    base: str
    closed: bool = True

    def cut(self, start: int, stop: int) -> Files:
        """Return a range."""
        return replace(self, index=self.index.cut(start, stop))

    def path(self, index: int) -> str | None:
        """Return a file's path; None where the table's cell is empty."""
        place = self.index.place(index)
        return os.path.join(self.base, place) if isinstance(place, str) else None

    def read(self, index: int) -> Path:
        """Return the file."""
        path = self.path(index)
        if path is None:
            raise BadRecord("no path in the cell")
        if not self.closed and str(self.index.place(index)).startswith(("http://", "https://", "s3://")):
            raise BadRecord("an address, not a path: only files are read")
        if self.closed and os.path.islink(path):
            root, real = os.path.realpath(self.base), os.path.realpath(path)
            if not real.startswith(os.path.join(root, "")):
                raise BadRecord("a link that leads out of the folder")
        return Path(path)

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield the files."""
        return one_by_one(self, start, stop)


@dataclass(frozen=True)
class Cells:
    """Images in memory: paths, bytes, or dicts of `bytes` and `path`."""

    name: str
    index: Index
    values: Sequence[object]

    def cut(self, start: int, stop: int) -> Cells:
        """Return a range."""
        return replace(self, index=self.index.cut(start, stop), values=self.values[start:stop])

    def read(self, index: int) -> Data:
        """Return a cell's bytes, or the file it names."""
        value = self.values[index]
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str | os.PathLike):
            return Path(value)
        return checked(value)

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield the cells."""
        return one_by_one(self, start, stop)


def checked(value: object) -> bytes:
    """Return a cell that holds an encoded image."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise BadRecord("no image in the cell" if value is None else f"a {type(value).__name__}, not an image")


@dataclass(frozen=True)
class Packed:
    """Encoded images in a parquet column.

    Args:
        name: The file.
        index: The rows.
        column: The column, `image.bytes` in a struct.
        ends: The number of the row after each row group.
    """

    name: str
    index: Index
    column: str
    ends: tuple[int, ...]

    def cut(self, start: int, stop: int) -> Packed:
        """Return a range."""
        return replace(self, index=self.index.cut(start, stop))

    def read(self, index: int) -> bytes:
        """Return a cell, out of its row group, the last few of which are kept."""
        row = self.index.first + index
        group = next(i for i, end in enumerate(self.ends) if row < end)
        column = _row_group(self.name, stamp(self.name), self.column, group)
        return checked(column[row - (self.ends[group - 1] if group else 0)].as_py())

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield cells, a few at a time."""
        first, last = self.index.first + start, self.index.first + stop
        starts = (0, *self.ends[:-1])
        groups = [i for i, end in enumerate(self.ends) if end > first and starts[i] < last]
        with opened(self.name) as file:
            row = starts[groups[0]] if groups else 0
            for batch in file.iter_batches(CELLS, row_groups=groups, columns=[self.column]):
                for value in _flat(batch.column(0))[max(0, first - row) : max(0, last - row)]:
                    try:
                        yield checked(value.as_py())
                    except BadRecord as error:
                        yield error
                row += batch.num_rows
                if row >= last:
                    return


def opened(path: str) -> pq.ParquetFile:
    """Open a parquet file to be streamed."""
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file that can be read: {error}") from error


def _flat(column: Any) -> Any:
    """Return a struct's only field that was asked for, or the column."""
    return column.field(0) if pa.types.is_struct(column.type) else column


@lru_cache(maxsize=2)
def _row_group(path: str, _stamp: object, column: str, group: int) -> Any:
    table = opened(path).read_row_group(group, columns=[column])
    return _flat(table.column(0).combine_chunks())


def stamp(path: str) -> tuple[int, int]:
    """Return what changes when a file is replaced: the key of what is kept of it."""
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


@dataclass(frozen=True)
class Zip:
    """Members of a zip archive."""

    name: str
    index: Index

    def cut(self, start: int, stop: int) -> Zip:
        """Return a range."""
        return replace(self, index=self.index.cut(start, stop))

    def read(self, index: int) -> bytes:
        """Unpack a member into memory."""
        archive = _zip(self.name, stamp(self.name), os.getpid())
        member = archive.getinfo(str(self.index.place(index)))
        if member.file_size > MAX_BYTES:
            raise BadRecord(f"too large: {member.file_size >> 20} MiB, at most {MAX_BYTES >> 20}")
        try:
            with archive.open(member) as file:
                return file.read(MAX_BYTES + 1)  # a size that lies ends here
        except RuntimeError as error:  # a password is wanted
            raise BadRecord("encrypted in the archive") from error
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
            raise BadRecord(f"damaged in the archive: {error}") from error
        except Exception as error:
            if type(error).__name__ not in ("error", "LZMAError"):  # zlib's and lzma's have no common parent
                raise
            raise BadRecord(f"damaged in the archive: {error}") from error

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield members."""
        return one_by_one(self, start, stop)


@lru_cache(maxsize=4)
def _zip(path: str, _stamp: object, _process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # its list of members takes a while to read: once a process


@dataclass(frozen=True)
class Tar:
    """Members of a tar archive, in its order.

    Args:
        name: The file.
        index: The members.
        offsets: Where each member's bytes begin; None in a compressed archive, -1 for a link.
        sizes: How many they are.
    """

    name: str
    index: Index
    offsets: pa.Array | None
    sizes: pa.Array

    def cut(self, start: int, stop: int) -> Tar:
        """Return a range."""
        offsets, sizes = (
            None if each is None else pa.array(each[start:stop].to_pylist(), pa.int64())
            for each in (self.offsets, self.sizes)
        )
        return replace(self, index=self.index.cut(start, stop), offsets=offsets, sizes=sizes)

    def read(self, index: int) -> bytes:
        """Read a member's bytes at their place."""
        if self.offsets is None:
            raise DataError(f"{self.name} is compressed, and has no places to go to: unpack it, or use a zip")
        offset, size = self.offsets[index].as_py(), self.sizes[index].as_py()
        _check_member(offset, size)
        with open(self.name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def stream(self, start: int, stop: int) -> Iterator[Data | BadRecord]:
        """Yield members; of a compressed archive, what lies before them is unpacked, too."""
        if self.offsets is not None:
            yield from one_by_one(self, start, stop)
            return
        wanted = start
        with tarfile.open(self.name, "r|*") as archive:
            while wanted < stop:
                member = archive.next()
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                if member is None:
                    raise DataError(f"{self.name} changed while it was read")
                if member.name != self.index.place(wanted):
                    continue
                wanted += 1
                try:
                    _check_member(member.offset_data if member.isreg() else -1, member.size)
                    file = archive.extractfile(member)
                    yield file.read() if file is not None else BadRecord("no file in the archive")
                except BadRecord as error:
                    yield error


def _check_member(offset: int, size: int) -> None:
    if offset < 0:
        raise BadRecord("a link or device in the archive")
    if size > MAX_BYTES:
        raise BadRecord(f"too large: {size >> 20} MiB, at most {MAX_BYTES >> 20}")
