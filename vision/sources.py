"""Where images come from: folders, files, tables, archives; listed without being decoded.

| source | ids | images |
|---|---|---|
| folder | relative path | every file with an image's suffix, at any depth, sorted; hidden files left out |
| image files | path below their common folder | as given, whatever the suffix |
| CSV, parquet | column `id`, else the path, else the row's number | column `image`: path (relative to the table), bytes, or a struct of both |
| zip, tar | member's path | every member with an image's suffix |
| DataFrame | column `id`, else the index | column `image`: path or bytes |

Several sources together: ids begin with the source's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from manyheads.core import predictor as core


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
    """The images of a source, in a fixed order. Small (some 40 bytes an image), and nothing is open.

    A table's images are its rows, all of them, in order. Picklable; what is opened to read is opened in
    each process anew.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> ImageRef | Listing:
        """Return one image's reference, or a listing of a range (step 1)."""
        raise NotImplementedError

    def read(self, index: int) -> bytes | Path:
        """Return what `images.decode` takes of one image, in any order of calls.

        Cheap for files, zip and plain tar; a parquet's row group is read whole and the last few are kept.

        Raises:
            BadRecord: There is no such file, member or value, or it is too large.
            DataError: A compressed tar, which has no places to go to.
        """
        raise NotImplementedError

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[ImageRef, object]]:
        """Yield the images of a range in order: the reference, and bytes, Path, or a `BadRecord`."""
        raise NotImplementedError


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
    raise NotImplementedError
