"""Where images come from: folders, files, tables, archives; listed without being decoded.

- A folder: every file with an image's suffix, at any depth, sorted; hidden files are left out, links to
  folders not followed. Ids are relative paths.
- Image files: as given, whatever the suffix. Ids are their paths below their common folder.
- A CSV or parquet table: column `image` with a path (relative to the table), bytes, or a struct of both. Ids
  are the column `id`, else the path, else the row's number.
- A zip or tar archive: members with an image's suffix; a zip's are sorted, a tar's in its order. Ids are
  their paths.
- A DataFrame: column `image` with paths or bytes. Ids are the column `id`, else the index.

Several sources together: ids begin with the source's name. A parquet's row groups and an archive's members
are streamed; a compressed tar only from its start, so that zip or plain tar serve large sets better.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.vision import tables
from manyheads.vision.archives import list_tar, list_zip
from manyheads.vision.containers import Cells, Container, Data, Files, Index, Names

if TYPE_CHECKING:
    import pandas as pd

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# What an image folder holds. Those of other formats are listed as well, and refused with the reason: a photo
# that is left out in silence would be worse.
# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jpx", ".j2k",
    ".tga", ".ico", ".svg", ".psd", ".eps", ".exr", ".hdr", ".pcx",
))
# fmt: on
SOURCES = "a folder, an image, a CSV or parquet file, a zip or tar archive, a list of these, or a DataFrame"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a listing.

    Args:
        id: Unique within the listing.
        container: Folder, table or archive.
        place: The path below the folder (or of its own), the table's row, or the archive's member.
        label: The text of the label column, or the class folder; None without.
    """

    id: str
    container: str
    place: str | int
    label: str | None = None


class Listing(Sequence[ImageRef]):
    """The images of a source, in a fixed order. Small, and nothing is open.

    A table's images are its rows, all of them, in order. Picklable; what is opened to read is opened in each
    process anew.

    Args:
        containers: What holds the images.
        prefixes: What the ids of each begin with.
    """

    def __init__(self, containers: Sequence[Container], prefixes: Sequence[str]) -> None:
        self.containers, self.prefixes = tuple(containers), tuple(prefixes)
        self._ends = list(accumulate(each.index.count for each in containers))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> ImageRef | Listing:
        """Return one image's reference, or a listing of a range (step 1) with no memory of the rest."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a listing is cut in steps of 1")
            return self._cut(start, stop)
        i, position = self._locate(index)
        return self._ref(i, position)

    def _ref(self, i: int, position: int) -> ImageRef:
        container = self.containers[i]
        name, index = self.prefixes[i] + container.index.id(position), container.index
        return ImageRef(name, container.name, index.place(position), index.label(position))

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the container of an image, and its position there."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        i = bisect_right(self._ends, index)
        return i, index - (self._ends[i - 1] if i else 0)

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the containers of a range, each with the positions there."""
        for i, end in enumerate(self._ends):
            begin = end - self.containers[i].index.count
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield i, first - begin, last - begin

    def _cut(self, start: int, stop: int) -> Listing:
        found = [(self.containers[i].cut(a, b), self.prefixes[i]) for i, a, b in self._ranges(start, stop)]
        return Listing([each for each, _ in found], [prefix for _, prefix in found])

    def read(self, index: int) -> Data:
        """Return what `images.decode` takes of one image, in any order of calls.

        Cheap for files, zip and plain tar; a parquet's row group is read whole and the last two are kept.

        Raises:
            BadRecord: There is no such file, member or value, or it is too large.
            DataError: A compressed tar, which has no places to go to.
        """
        i, position = self._locate(index)
        return self.containers[i].read(position)

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[ImageRef, Data | BadRecord]]:
        """Yield a range's images in order: the reference, and what `images.decode` takes or a BadRecord."""
        for i, first, last in self._ranges(start, len(self) if stop is None else stop):
            for position, data in enumerate(self.containers[i].stream(first, last), first):
                yield self._ref(i, position), data

    def named_files(self) -> Iterator[str]:
        """Yield the files that tables name: their content is none of the table's own."""
        for container in self.containers:
            if isinstance(container, Files) and container.name != container.base:
                yield from filter(None, map(container.path, range(container.index.count)))


def list_images(
    source: core.Source,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    id_column: str = "id",
    folder_labels: bool = False,
) -> Listing:
    """List the images of a source without decoding any.

    Args:
        source: A path or pattern, several of them, or a DataFrame.
        image_column: A table's column with path, bytes, or a struct of `bytes` and `path`.
        label_column: A table's column of labels.
        id_column: A table's column of ids, used where there is one.
        folder_labels: Labels are the first folder of an image's path, in folders and archives.

    Raises:
        UsageError: No such source, or two of one name.
        DataError: A table without the column, an id twice, or an archive that cannot be read.
    """
    import pandas as pd

    columns = tables.Columns(image_column, label_column, id_column)
    if isinstance(source, pd.DataFrame):
        return Listing([_frame(source, columns)], [""])
    listed = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(listed, Sequence) or not all(isinstance(each, str | os.PathLike) for each in listed):
        raise UsageError(f"images come from {SOURCES}")
    paths = [path for each in listed for path in _matches(os.fspath(each))]
    others = [path for path in paths if os.path.isdir(path) or _kind(path)]
    loose = [path for path in paths if not (os.path.isdir(path) or _kind(path))]
    found: list[Container] = [_loose(loose)] if loose else []
    found += [_open(path, columns, folder_labels) for path in others]
    names = ([""] if loose else []) + [f"{Path(path).resolve().name}/" for path in others]
    if len(found) == 1:
        names = [""]
    _check_names(names, found[0] if loose and others else None)
    return Listing(found, names)


def _kind(path: str) -> str:
    """Return the suffix of a table or archive; empty for others."""
    lower = path.lower()
    return next((end for end in (*tables.SUFFIXES, *ARCHIVES) if lower.endswith(end)), "")


def _matches(path: str) -> list[str]:
    if os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise UsageError(f"no images at {path}: there is no such file, folder or pattern")
    return found


def _check_names(names: Sequence[str], loose: Container | None) -> None:
    """Refuse ids that could meet."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"two sources are called {name[:-1]!r}, so ids would not differ; rename one")
    if loose is not None:
        for i in range(loose.index.count):
            if str(loose.index.place(i)).partition("/")[0] + "/" in names:
                raise UsageError(f"an image and a source begin with {loose.index.place(i)!r}; rename one")


def _open(path: str, columns: tables.Columns, folder_labels: bool) -> Container:
    if os.path.isdir(path):
        found: Container = _folder(path)
    elif _kind(path) in tables.SUFFIXES:
        return tables.open_table(path, columns)
    else:
        found = list_zip(path, is_image) if _kind(path) == ".zip" else list_tar(path, is_image)
    if not found.index.count:
        raise DataError(f"{path} holds no images (no file with a suffix like .jpg, .png or .tif)")
    labelled = replace(found.index, by_folder=folder_labels)
    return replace(found, index=labelled)  # type: ignore[type-var]


def is_image(name: str) -> bool:
    """Tell by its name whether a folder's or archive's file counts: nothing hidden, an image's suffix."""
    parts = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    hidden = hidden or parts[0] == "__MACOSX"
    return not hidden and os.path.splitext(parts[-1])[1].lower() in SUFFIXES


def _folder(path: str) -> Files:
    """Walk a folder; entries alone are held, and no file is opened."""
    names: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = os.scandir(os.path.join(path, below))
        except OSError as error:
            raise DataError(
                f"cannot list the folder {os.path.join(path, below)}: {error.strerror}"
            ) from error
        with entries:
            for entry in entries:
                name = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        waiting.append(f"{name}/")
                elif is_image(entry.name):
                    names.append(name)
    names.sort()
    return Files(path, Index(len(names), Names(names)), path)


def _loose(paths: Sequence[str]) -> Files:
    """Image files named one by one."""
    whole = [os.path.abspath(path) for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for i, path in enumerate(whole) if path in whole[:i])
        raise UsageError(f"{twice} is given twice")
    base = os.path.dirname(whole[0]) if len(whole) == 1 else os.path.commonpath(map(os.path.dirname, whole))
    names = Names([os.path.relpath(path, base) for path in whole])
    return Files(base, Index(len(whole), names), base, closed=False)


def _frame(frame: pd.DataFrame, columns: tables.Columns) -> Cells:
    """Take a DataFrame's cells."""
    columns.check([str(name) for name in frame.columns], "the DataFrame")
    ids = frame[columns.id] if columns.id in frame.columns else frame.index
    found = Names([str(each) for each in ids])
    tables.check_ids(found, "the DataFrame")
    labels = None
    if columns.label is not None:
        column = frame[columns.label]
        labels = Names([None if gone else str(e) for e, gone in zip(column, column.isna(), strict=True)])
    index = Index(len(frame), None, found, labels)
    return Cells("DataFrame", index, frame[columns.image].tolist())
