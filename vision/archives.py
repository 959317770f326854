"""The members of zip and tar archives, listed by their headers. Nothing is ever unpacked to a disk."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import pyarrow as pa

from manyheads.core.errors import DataError
from manyheads.vision.containers import Index, Names, Tar, Zip


def list_zip(path: str, wanted: Callable[[str], bool]) -> Zip:
    """List a zip's members, sorted by name.

    Raises:
        DataError: It is no zip, or a name stands twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted(name for name in archive.namelist() if not name.endswith("/") and wanted(name))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{path} is no zip archive that can be read: {error}") from error
    return Zip(path, _index(path, found))


def list_tar(path: str, wanted: Callable[[str], bool]) -> Tar:
    """List a tar's members in its order; a compressed one is unpacked once for this, in memory.

    Raises:
        DataError: It is no tar, ends early, or a name stands twice.
    """
    names, offsets, sizes = [], [], []
    try:
        plain = _is_plain(path)
        with tarfile.open(path, "r:" if plain else "r|*") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                if not member.isdir() and wanted(member.name):
                    names.append(member.name)
                    offsets.append(member.offset_data if member.isreg() and not member.issparse() else -1)
                    sizes.append(member.size)
    except (tarfile.TarError, OSError, EOFError, TypeError, ValueError, zlib.error, lzma.LZMAError) as error:
        # TypeError: tarfile's own, of a header that ends early
        raise DataError(f"{path} is no tar archive that can be read: {error}") from error
    places = pa.array(offsets, pa.int64()) if plain else None
    return Tar(path, _index(path, names), places, pa.array(sizes, pa.int64()))


def _is_plain(path: str) -> bool:
    """Tell whether a tar is not compressed, by its content."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.ReadError:
        return False


def _index(path: str, names: list[str]) -> Index:
    found = Names(names)
    double = Names([name.removeprefix("./") for name in names]).double()
    if double is not None:
        raise DataError(f"{path} has two members {double!r}")
    return Index(len(names), found)
