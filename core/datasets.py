"""The data sets: where they are looked for, and a verified download. Imports neither torch nor pandas.

A domain's `datasets/__init__.py` holds `DATASETS`, a tuple of `DataSet`; nothing is found by scanning.
Search order: the folders in MANYHEADS_DATA, the cache (MANYHEADS_CACHE), the copy in the package, a download.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from manyheads.core.catalog import DOMAINS, table
from manyheads.core.errors import DataError, UsageError, did_you_mean

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class DataSet:
    """One data set. Data only.

    Args:
        name: Its name in commands and configs.
        domain: Its domain.
        summary: What it holds, in a line.
        licence: Licence, and what it permits.
        path: Where it lies below a data folder; the file there may also end in .gz.
        size: Size of the plain file in bytes.
        sha256: Checksum of the plain file.
        split: The standard split's name.
        shape: Rows and columns.
        columns: The columns' names.
        address: Where it can be downloaded and has this checksum; None if nowhere known.
        embedded: Package and file of the copy in the wheel, as "package:file".
    """

    name: str
    domain: str
    summary: str
    licence: str
    path: str
    size: int
    sha256: str
    split: str
    shape: tuple[int, int]
    columns: tuple[str, ...]
    address: str | None = None
    embedded: str | None = None


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


def _present(dataset: DataSet) -> Path | None:
    """Look in MANYHEADS_DATA, the cache and the package."""
    folders = [Path(folder) for folder in os.environ.get("MANYHEADS_DATA", "").split(os.pathsep) if folder]
    for folder in (*folders, cache_folder() / "data"):
        for path in (folder / dataset.path, folder / f"{dataset.path}.gz"):
            if path.is_file():
                return path
    if dataset.embedded:
        package, _, file = dataset.embedded.partition(":")
        return Path(str(importlib.resources.files(package).joinpath(file)))
    return None


def locate(name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the file of a data set, downloading it if it is nowhere on this machine.

    Args:
        name: The data set's name.
        progress: Called with the bytes received and the bytes to come.

    Raises:
        UsageError: No such data set.
        DataError: It is not here and cannot be downloaded; says where to put it.
    """
    dataset = find(name)
    return _present(dataset) or download(dataset, progress)


def _checked(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise DataError(f"{address}: only https addresses are downloaded from")
    return address


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect may not leave https either."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> urllib.request.Request | None:
        return super().redirect_request(req, fp, code, msg, headers, _checked(newurl))  # type: ignore[arg-type]


def _receive(dataset: DataSet, partial: Path, progress: Callable[[int, int], None] | None) -> str:
    """Stream the address to a file, never more than the known size; returns the checksum of what came."""
    assert dataset.address is not None
    digest, received = hashlib.sha256(), 0
    opener = urllib.request.build_opener(_CheckedRedirects)
    with opener.open(_checked(dataset.address), timeout=60) as answer, partial.open("wb") as file:
        while block := answer.read(1 << 16):
            received += len(block)
            if received > dataset.size:
                raise DataError(
                    f"{dataset.address} sends more than the {dataset.size} bytes it should; nothing was kept"
                )
            digest.update(block)
            file.write(block)
            if progress:
                progress(received, dataset.size)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def download(dataset: DataSet, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download a data set to the cache; it is moved in place after its checksum has been verified.

    Args:
        dataset: The data set.
        progress: Called with the bytes received and the bytes to come.

    Raises:
        DataError: No address, no connection, or other bytes than expected.
    """
    if dataset.address is None:
        raise DataError(
            f"data set {dataset.name!r} has no address with a known checksum, so it is not downloaded; "
            f"put the file at {dataset.path}[.gz] below a folder and set MANYHEADS_DATA to that folder"
        )
    target = cache_folder() / "data" / dataset.path
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _receive(dataset, partial, progress)
        if found != dataset.sha256:
            raise DataError(
                f"{dataset.address} sent other bytes than expected (sha256 {found[:12]}..., not "
                f"{dataset.sha256[:12]}...); nothing was kept"
            )
        partial.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"data set {dataset.name!r} could not be downloaded from {dataset.address} ({error}); "
            f"put the file at {dataset.path} below a folder and set MANYHEADS_DATA to that folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target
