"""One manifest for all training images: what they are called, where they lie, their labels, groups and parts.

| source | labels | parts |
|---|---|---|
| folder, zip or plain tar | `class/*`, or `train/class/*`, `val/class/*`, `test/class/*` | by folder |
| CSV or parquet | a column; several columns of 0, 1 and nothing (unknown) | a column |
| folder of parquet or CSV files named after their parts | as above | by file name |
| folder of idx files (`train-images-idx3-ubyte`, packed or not) | given | given |

Arrays, not objects: some 60 bytes an image. Nothing is decoded here.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from manyheads.core.errors import BadRecord, DataError
from manyheads.vision import idx, images
from manyheads.vision.containers import Container, Files, Packed, Tar, checked
from manyheads.vision.labels import Cells, sort_labels
from manyheads.vision.sources import Listing, list_images
from manyheads.vision.splits import OPEN, TEST, TRAIN, VAL, Targets

TABLES = (".csv", ".csv.gz", ".parquet", ".pq")
_CHUNK = 64 << 20  # bytes copied at a time
_PART_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "dev": VAL,
    "test": TEST,
    "testing": TEST,
}


class Store(Protocol):
    """Images by number: a listing of encoded ones, or arrays of pixels."""

    def __len__(self) -> int:
        """How many there are."""

    def id(self, index: int) -> str:
        """Return what an image is called."""

    def image(self, index: int, channels: int, at_least: int | None) -> Image.Image:
        """Return an image, decoded; raises BadRecord."""

    def digest(self, index: int) -> bytes:
        """Return a checksum of an image's content; raises BadRecord."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what.

    Args:
        image: Holds a path (relative to the table) or an encoded image.
        label: Holds the class, or several names: 0, 1 or nothing (unknown) each.
        group: Images of one group stay in one part.
        split: Holds train, val or test.
        folder: What the paths are relative to, if not to the table.
    """

    image: str = "image"
    label: str | list[str] = "label"
    group: str | None = None
    split: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Images with what is known of each.

    Args:
        source: What the images come from, for messages.
        store: The images.
        labels: Names of the classes or labels.
        targets: The class of each image, or 0, 1 and NaN for each label.
        parts: TRAIN, VAL, TEST or OPEN of each image.
        groups: Number of each image's group, if they have any.

    Shape:
        targets `[n]` int64 or `[n, K]` float32; parts `[n]`; groups `[n]`.
    """

    source: str
    store: Store
    labels: tuple[str, ...]
    targets: Targets
    parts: NDArray[np.int8]
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.targets.ndim == 2

    def counts(self, rows: NDArray[np.integer]) -> list[int]:
        """Return how many of some images are of each class, or have each label."""
        if self.multi_label:
            return [int(n) for n in (self.targets[rows] == 1).sum(axis=0)]
        return [int(n) for n in np.bincount(self.targets[rows].astype(np.int64), minlength=len(self.labels))]

    def check(self) -> None:
        """Refuse what cannot be trained on.

        Raises:
            DataError: No image, one class only, or a class with a single image.
        """
        if not len(self):
            raise DataError(f"{self.source}: no images")
        if self.multi_label or not (self.parts != TEST).any():
            return
        counts = np.array(self.counts(np.flatnonzero(self.parts != TEST)))
        if len(self.labels) < 2:
            raise DataError(f"{self.source}: one class only ({self.labels[0]!r}); two are needed")
        single = np.flatnonzero(counts == 1)
        if len(single):
            more = f" and {len(single) - 1} others" if len(single) > 1 else ""
            name = self.store.id(int(np.flatnonzero(self.targets == single[0])[0]))
            raise DataError(
                f"{self.source}: class {self.labels[single[0]]!r}{more} has a single image ({name}): it "
                "cannot be both learned and validated; add images or leave it out"
            )


class Listed:
    """The images of a listing (`vision.sources`)."""

    def __init__(self, sources: Sequence[str], column: str = "image", folder: str | None = None) -> None:
        listing = list_images(sources, image_column=column)
        if folder is not None:
            found = [replace(c, base=folder) if isinstance(c, Files) else c for c in listing.containers]
            listing = Listing(found, listing.prefixes)
        self.listing = listing
        # What cannot be read in any order (cells of a parquet, a compressed tar) is copied out once.
        self._cells = _copied(listing) if any(map(_streams_only, listing.containers)) else None

    def __len__(self) -> int:
        return len(self.listing)

    def id(self, index: int) -> str:
        """Return the listing's id."""
        return self.listing[index].id

    def read(self, index: int) -> bytes | Path:
        """Return an encoded image."""
        return self.listing.read(index) if self._cells is None else checked(self._cells[index].as_py())

    def image(self, index: int, channels: int, at_least: int | None) -> Image.Image:
        """Read and decode an image."""
        return images.decode(self.read(index), channels, at_least)

    def digest(self, index: int) -> bytes:
        """Return a checksum of an encoded image."""
        data = self.read(index)
        content = images.read(data) if isinstance(data, Path) else data
        return hashlib.blake2b(content, digest_size=16).digest()


def _streams_only(container: Container) -> bool:
    return isinstance(container, Packed) or (isinstance(container, Tar) and container.offsets is None)


def _copied(listing: Listing) -> pa.ChunkedArray:
    """Copy encoded images to a temporary file that is mapped into memory: read in any order, held by no one.

    Raises:
        DataError: There is no room for it.
    """
    kind = pa.large_binary()
    with tempfile.NamedTemporaryFile(prefix="manyheads-") as file:
        try:
            with pa.ipc.new_file(file.name, pa.schema([("image", kind)])) as writer:
                images_: list[bytes | None] = []
                size = 0
                for _, data in listing.stream():
                    encoded = data.read_bytes() if isinstance(data, Path) else data
                    images_.append(encoded if isinstance(encoded, bytes) else None)
                    size += len(images_[-1] or b"")
                    if size > _CHUNK:
                        writer.write_batch(pa.record_batch([pa.array(images_, kind)], ["image"]))
                        images_, size = [], 0
                writer.write_batch(pa.record_batch([pa.array(images_, kind)], ["image"]))
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all().column(0)
        except OSError as error:
            raise DataError(f"cannot copy {listing.containers[0].name} to {file.name}: {error}") from error


_USUAL = Columns()


def part_of(name: str) -> int | None:
    """Return the part that a folder or a cell names; None if it names none."""
    return _PART_NAMES.get(name.strip().lower())


def read_manifest(
    path: Path, columns: Columns = _USUAL, labels: Sequence[str] | None = None, part: int = OPEN
) -> Manifest:
    """Read the manifest of a folder, a table or an archive.

    Args:
        path: The folder or file.
        columns: A table's columns.
        labels: Names of all classes, where the table's label column has their numbers.
        part: The part that a table's rows are of, where nothing else says it.

    Raises:
        DataError: What is wrong with it.
    """
    if path.is_dir():
        found = _table_parts(path)
        if idx.is_folder(path):
            manifest = _from_idx(path)
        else:
            manifest = _from_tables(path, found, columns) if found else _from_folders(path)
    elif not path.is_file():
        raise DataError(f"no folder or file {path}")
    elif path.name.lower().endswith(TABLES):
        manifest = _from_tables(path, [(path, part)], columns, labels)
    else:
        manifest = _from_folders(path)
    manifest.check()
    return manifest


def _from_idx(path: Path) -> Manifest:
    store, targets, first_test = idx.read_folder(path)
    parts = np.full(len(store), TRAIN, np.int8)
    parts[first_test:] = TEST
    labels = tuple(str(i) for i in range(int(targets.max()) + 1))
    return Manifest(str(path), store, labels, targets, parts)


def _table_parts(folder: Path) -> list[tuple[Path, int]]:
    """Return the tables in a folder that are named after their parts (`train-00000.parquet`).

    Not where folders are named so: such a table then only repeats what they say.
    """
    found = []
    if any(path.is_dir() and part_of(path.name) is not None for path in folder.iterdir()):
        return []
    for path in sorted(p for p in folder.iterdir() if p.name.lower().endswith(TABLES)):
        words = path.name.lower().replace("-", "_").replace(".", "_").split("_")
        part = next((part_of(word) for word in words if part_of(word) is not None), None)
        if part is not None:
            found.append((path, part))
    return found


def _from_folders(path: Path) -> Manifest:
    """Classes are folders, perhaps below folders of parts; one folder around all of them is not counted."""
    store = Listed([str(path)])
    n, ids = len(store), store.id
    heads = {ids(i).partition("/")[0] for i in range(n)}
    depth = 0
    if len(heads) == 1 and part_of(min(heads)) is None and all(ids(i).count("/") > 1 for i in range(n)):
        depth, heads = 1, {ids(i).split("/")[1] for i in range(n)}
    given = {head: part for head in heads if (part := part_of(head)) is not None}
    divided = len(given) == len(heads)
    parts, codes = np.full(n, OPEN, np.int8), np.empty(n, np.int64)
    numbers: dict[str, int] = {}
    for i in range(n):
        words = ids(i).split("/")[depth:]
        if divided:
            parts[i] = given[words.pop(0)]
        if len(words) < 2:
            raise DataError(
                f"{path}: {ids(i)} lies in no class folder ({path.name}/class/image.jpg is expected)"
            )
        codes[i] = numbers.setdefault(words[0], len(numbers))
    labels, targets = sort_labels(list(numbers), codes)
    return Manifest(str(path), store, labels, targets, parts)


def _from_tables(
    source: Path, files: Sequence[tuple[Path, int]], columns: Columns, known: Sequence[str] | None = None
) -> Manifest:
    """Read labels, groups and parts of one table, or of several one under the other."""
    paths = [str(path) for path, _ in files]
    several = columns.label if isinstance(columns.label, list) else None
    single = None if isinstance(columns.label, list) else columns.label
    cells = Cells(paths, [*(several or [str(single)]), *filter(None, (columns.group, columns.split))])
    store = Listed(paths, columns.image, columns.folder)
    if len(store) != len(cells):
        raise DataError(f"{source}: {len(store)} images, but {len(cells)} rows")
    if not len(store):
        raise DataError(f"{source}: no images")
    labels: tuple[str, ...]
    targets: Targets
    if several is not None:
        labels, targets = tuple(several), cells.several(several)
    elif known is not None:
        labels, targets = tuple(known), cells.numbers(str(single), len(known))
    else:
        labels, targets = cells.classes(str(single))
    if columns.split:
        parts = cells.parts(columns.split, part_of)
    else:
        parts = np.repeat(np.array([part for _, part in files], np.int8), cells.counts)
    groups = cells.groups(columns.group) if columns.group else None
    _check_files(str(source), store.listing)
    return Manifest(str(source), store, labels, targets, parts, groups)


def shared_content(manifest: Manifest, parts: NDArray[np.int8]) -> list[tuple[int, int]]:
    """Return pairs of images of two parts with the same content, one pair a content."""
    first: dict[bytes, int] = {}
    found: dict[bytes, tuple[int, int]] = {}
    for i in range(len(manifest)):
        try:
            digest = manifest.store.digest(i)
        except BadRecord:
            continue
        before = first.setdefault(digest, i)
        if parts[before] != parts[i]:
            found.setdefault(digest, (before, i))
    return list(found.values())


def _check_files(source: str, listing: Listing) -> None:
    """Refuse a table that names files which are not there.

    Raises:
        DataError: Says how many, and names the first.
    """
    missing, first = 0, ""
    for path in listing.named_files():
        if not os.path.isfile(path):
            missing, first = missing + 1, first or path
    if missing:
        raise DataError(f"{source}: {missing} of {len(listing)} files are missing, the first is {first}")
