"""The data sets: where they are looked for, and a verified download. Imports neither torch nor pandas.

A domain's `datasets/__init__.py` holds `DATASETS`, a tuple of `DataSet`; nothing is found by scanning.
Search order: the folders in MANYHEADS_DATA, the cache (MANYHEADS_CACHE), the copy in the package, a download.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from manyheads.core.catalog import DOMAINS, table
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.network import Broken, Refused, open_address


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Args:
        path: Where it lies below a data folder; the file there may also end in .gz.
        size: Size of the plain file in bytes.
        sha256: Checksum of the plain file.
        address: Where it can be downloaded and has this checksum, packed there if it ends in .gz; None if
            nowhere known.
        embedded: Package and file of the copy in the wheel, as "package:file".
    """

    path: str
    size: int
    sha256: str
    address: str | None = None
    embedded: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set. Data only.

    Args:
        name: Its name in commands and configs.
        domain: Its domain.
        summary: What it holds, in a line.
        licence: Licence, and what it permits.
        files: Its files; several lie in one folder.
        split: The standard split's name.
        shape: Rows and columns, or images, height, width and channels.
        columns: The columns' names.
    """

    name: str
    domain: str
    summary: str
    licence: str
    files: tuple[File, ...]
    split: str
    shape: tuple[int, ...]
    columns: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all plain files."""
        return sum(file.size for file in self.files)


def datasets(domain: str | None = None) -> list[DataSet]:
    """Return the data sets, of all domains or of one.

    Raises:
        UsageError: No such domain.
    """
    if domain is not None and domain not in DOMAINS:
        raise UsageError(
            f"no domain {domain!r}{did_you_mean(domain, DOMAINS)} (domains: {', '.join(DOMAINS)})"
        )
    wanted = DOMAINS if domain is None else (domain,)
    return [d for each in wanted for d in table(each, "datasets").DATASETS]


def find(name: str) -> DataSet:
    """Return the data set of a name.

    Raises:
        UsageError: No data set has this name; the closest name is suggested.
    """
    known = {dataset.name: dataset for dataset in datasets()}
    if name not in known:
        raise UsageError(
            f"no data set {name!r}{did_you_mean(name, known)} (`manyheads data list` lists them)"
        )
    return known[name]


def cache_folder() -> Path:
    """Return the folder that downloads go to."""
    return Path(os.environ.get("MANYHEADS_CACHE") or Path.home() / ".cache" / "manyheads")


def _below(folder: Path, file: File) -> Path | None:
    """Find a file below a data folder, plain or packed."""
    for path in (folder / file.path, folder / f"{file.path}.gz"):
        if path.is_file():
            return path
    return None


def _place(dataset: DataSet, first: Path) -> Path:
    """Return what stands for a data set: its file, or the folder of its several files."""
    return first if len(dataset.files) == 1 else first.parent


def present(dataset: DataSet) -> Path | None:
    """Return where a data set is: in MANYHEADS_DATA, the cache or the package; a folder has every file."""
    folders = [Path(folder) for folder in os.environ.get("MANYHEADS_DATA", "").split(os.pathsep) if folder]
    for folder in (*folders, cache_folder() / "data"):
        found = [_below(folder, file) for file in dataset.files]
        if found[0] is not None and None not in found:
            return _place(dataset, found[0])
    embedded = dataset.files[0].embedded
    if embedded:
        package, _, name = embedded.partition(":")
        return Path(str(importlib.resources.files(package).joinpath(name)))
    return None


def locate(name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the file of a data set, or the folder of its several, downloading what is nowhere here.

    Args:
        name: The data set's name.
        progress: Called with the bytes received and the bytes to come.

    Raises:
        UsageError: No such data set.
        DataError: It is not here and cannot be downloaded; says where to put it.
    """
    dataset = find(name)
    return present(dataset) or download(dataset, progress)


def _receive(file: File, partial: Path, progress: Callable[[int], None]) -> str:
    """Stream the address to a plain file, never more than the known size; returns its checksum."""
    assert file.address is not None
    digest, received = hashlib.sha256(), 0
    unpack = zlib.decompressobj(31) if file.address.endswith(".gz") else None
    with open_address(file.address).response as answer, partial.open("wb") as target:
        while block := answer.read(1 << 16):
            # One byte more than it should be is enough to see that it is too much, whatever it unpacks to.
            plain = unpack.decompress(block, file.size + 1 - received) if unpack else block
            received += len(plain)
            if received > file.size:
                raise DataError(
                    f"{file.address} sends more than the {file.size} bytes it should; nothing was kept"
                )
            digest.update(plain)
            target.write(plain)
            progress(received)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def download(dataset: DataSet, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download a data set to the cache; each file is moved in place after its checksum has been verified.

    Args:
        dataset: The data set.
        progress: Called with the bytes received and the bytes to come, of plain files.

    Raises:
        DataError: No address, no connection, or other bytes than expected.
    """
    lacking = [file for file in dataset.files if not _below(cache_folder() / "data", file)]
    for file in lacking:
        if file.address is None:
            raise DataError(
                f"data set {dataset.name!r} has no address with a known checksum, so it is not downloaded; "
                f"put the file at {file.path}[.gz] below a folder and set MANYHEADS_DATA to that folder"
            )
    done, total = 0, sum(file.size for file in lacking)

    def show(received: int) -> None:
        if progress:
            progress(done + received, total)

    for file in lacking:
        _download(dataset.name, file, show)
        done += file.size
    first = _below(cache_folder() / "data", dataset.files[0])
    assert first is not None
    return _place(dataset, first)


def _download(name: str, file: File, progress: Callable[[int], None]) -> None:
    target = cache_folder() / "data" / file.path
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _receive(file, partial, progress)
        if found != file.sha256:
            raise DataError(
                f"{file.address} sent other bytes than expected (sha256 {found[:12]}..., not "
                f"{file.sha256[:12]}...); nothing was kept"
            )
        partial.replace(target)
    except (Broken, Refused, HTTPException, OSError, zlib.error) as error:
        raise DataError(
            f"data set {name!r} could not be downloaded from {file.address} ({error}); "
            f"put the file at {file.path} below a folder and set MANYHEADS_DATA to that folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
