"""Models of a hub on this machine: one folder a commit, with a record of what was verified when it came.

`MANYHEADS_CACHE/models/org--name` holds `refs/` (which commit a branch or tag was when last asked for),
`files/<commit>/` (the published files) and `converted/` (model folders made of them). `manyheads.lock` in
each is written last and names the commit and every file's size and SHA-256: without it a folder is not whole.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from manyheads.core import files
from manyheads.core.datasets import cache_folder
from manyheads.core.errors import ManyheadsError
from manyheads.core.model_config import RECORD
from manyheads.core.references import Reference, is_commit, is_path
from manyheads.core.strict_json import Json, Wrong, parse

MAX_RECORD = 8 << 20
VERSION = 1
SMALL = 1 << 20  # bytes of a file that is read whenever its folder is used


@dataclass(frozen=True)
class Record:
    """What `manyheads.lock` holds.

    Args:
        reference: As it was asked for.
        commit: What was downloaded.
        endpoint: Where from.
        files: Size and SHA-256 of every file, by its name.
        dialect: The published layout that the model folder was converted from; "" where it was none.
        options: Of the conversion.
        licence: Of the weights, where anything says so.
        version: Of this record.
    """

    reference: str
    commit: str
    endpoint: str
    files: dict[str, tuple[int, str]]
    dialect: str = ""
    options: dict[str, str | int | float | bool] = dataclasses.field(default_factory=dict)
    licence: str = ""
    version: int = VERSION


def repository(reference: Reference) -> Path:
    """Return the folder of a repository, below a cache whose own folders are no links.

    Raises:
        ManyheadsError: A link stands in the way.
    """
    folder = cache_folder() / "models" / reference.repository.replace("/", "--")
    return _unlinked(folder, ("refs", "files", "converted"))


def snapshot(reference: Reference, commit: str) -> Path:
    """Return the folder of a commit's published files."""
    return _unlinked(repository(reference) / "files" / commit)


def converted(reference: Reference, name: str) -> Path:
    """Return the folder of a conversion."""
    return _unlinked(repository(reference) / "converted" / name)


def _unlinked(folder: Path, inside: tuple[str, ...] = ()) -> Path:
    for path in (folder, *(folder / name for name in inside)):
        if path.is_symlink():
            raise ManyheadsError(f"{path} is a symbolic link: the cache holds its folders itself; remove it")
    return folder


def place(folder: Path, name: str) -> Path:
    """Return where a repository's file lies in a folder; its folders are made.

    Raises:
        ManyheadsError: The name leads out of the folder, by itself or through a link.
    """
    if not is_path(name):
        raise ManyheadsError(f"the file name {name[:80]!r} leads out of its folder: refused")
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise ManyheadsError(f"{path} is a symbolic link: the cache holds its files itself; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(reference: Reference) -> Iterator[None]:
    """Hold a repository for this process: whoever wants the same one waits, and then finds it there."""
    folder = repository(reference)
    folder.mkdir(parents=True, exist_ok=True)
    path = _unlinked(folder / ".lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(
                f"manyheads: waiting for another process that fetches {reference.repository}", file=sys.stderr
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remember(reference: Reference, commit: str) -> None:
    """Keep which commit a branch or tag is."""
    path = _ref(reference)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, commit + "\n")


def remembered(reference: Reference) -> str | None:
    """Return the commit that a revision is, or was when last asked for; None where it was never."""
    if reference.commit is not None:
        return reference.commit
    path = _ref(reference)
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 100:
        return None
    commit = path.read_text(encoding="utf-8", errors="replace").strip()
    return commit if is_commit(commit) else None


def _ref(reference: Reference) -> Path:
    name = urllib.parse.quote(reference.revision or "main", safe="")
    return repository(reference) / "refs" / name


def write_record(folder: Path, record: Record) -> None:
    """Write `manyheads.lock`, which makes the folder a whole one."""
    files.write_atomic(folder / RECORD, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read_record(folder: Path) -> Record | None:
    """Read `manyheads.lock`; None where there is none.

    Raises:
        ManyheadsError: It is not what `write_record` writes.
    """
    path = folder / RECORD
    if path.is_symlink():
        raise ManyheadsError(f"{path} is a symbolic link: refused")
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_RECORD:
        raise ManyheadsError(f"{path} is no record of a download: too large")
    try:
        return _checked(parse(path.read_bytes()))
    except Wrong as error:
        raise ManyheadsError(f"{path} is no record of a download ({error}): remove {folder}") from error


def _checked(found: Json) -> Record:
    if not isinstance(found, dict):
        raise Wrong("not an object")
    kinds: dict[str, type] = {"reference": str, "commit": str, "endpoint": str, "files": dict, "dialect": str}
    kinds |= {"options": dict, "licence": str, "version": int}
    if found.keys() != kinds.keys() or not all(isinstance(found[key], kinds[key]) for key in kinds):
        raise Wrong("not its keys")
    if found["version"] != VERSION:
        raise Wrong(f"version {found['version']}; this version of manyheads reads {VERSION}")
    known: dict[str, tuple[int, str]] = {}
    for name, value in cast("dict[str, Json]", found["files"]).items():
        if not is_path(name) or not isinstance(value, list) or len(value) != 2:
            raise Wrong(f"its file {name[:80]!r}")
        size, digest = value
        if type(size) is not int or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise Wrong(f"its file {name[:80]!r}")
        known[name] = (size, digest)
    if any(isinstance(value, dict | list) for value in cast("dict[str, Json]", found["options"]).values()):
        raise Wrong("its options")
    return Record(**{**found, "files": known})  # type: ignore[arg-type]  # checked above


def check_files(folder: Path, record: Record, thorough: bool = True) -> int:
    """Compare a folder with its record.

    Args:
        folder: Of the files.
        record: What they should be.
        thorough: Read every byte; else sizes, and the content of small files.

    Returns:
        The bytes that are there.

    Raises:
        ManyheadsError: A file is missing, a link, or another one.
    """
    total = 0
    for name, (size, digest) in record.files.items():
        path = place(folder, name)
        if not path.is_file():
            raise ManyheadsError(f"{folder} has no {name}: fetch it again (`manyheads models pull`)")
        found = path.stat().st_size
        if found != size or ((thorough or size <= SMALL) and files.sha256(path) != digest):
            raise ManyheadsError(
                f"{path} is not what was downloaded (its {'size' if found != size else 'SHA-256'} differs):"
                f" damaged or replaced; remove {folder} and fetch it again"
            )
        total += size
    return total


def known() -> list[tuple[str, str]]:
    """Return the repositories and commits that are here, for a list of them."""
    folder = cache_folder() / "models"
    return sorted(
        (path.parents[1].name.replace("--", "/", 1), path.name)
        for path in folder.glob("*--*/files/*")
        if is_commit(path.name) and (path / RECORD).is_file()
    )
