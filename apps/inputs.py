"""A job's inputs: found, described for the fingerprint by their content, and watched while the job runs.

The content counts: a time stamp changes when a file is copied or restored, and may stay when an edit keeps
the size; a result mixed from two inputs is the worst outcome, and reading the input once more costs little
beside a model.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from manyheads.apps.stores import LocalStore, Store, is_address, local_path
from manyheads.core import files
from manyheads.core.errors import UsageError

if TYPE_CHECKING:
    from manyheads.apps.staging import Staged

SMALL = 1 << 20  # bytes of a file that is read at once
SAMPLE = 50  # files that a worker on another machine looks for

Advance: TypeAlias = Callable[[int], None]


def resolve(inputs: Sequence[str], store: Store, quiet: bool = True) -> list[Path]:
    """Return the files and folders that paths, patterns and addresses name, patterns in order of name.

    What lies elsewhere is copied to the job's spool folder.

    Raises:
        UsageError: One names nothing, or a folder that holds the output.
    """
    found: list[Path] = []
    for each in inputs:
        staged = staging_of([each], store)
        if staged is not None:
            found += staged.fetch(quiet)
            continue
        path = local_path(each)
        paths = (
            [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        )
        if not paths:
            raise UsageError(f"no input {each}")
        found += paths
    if isinstance(store, LocalStore):
        output = store.root
        for path in found:
            if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
                raise UsageError(f"the output {output} lies in the input folder {path}: choose another place")
    return found


def staging_of(inputs: Sequence[str], store: Store) -> Staged | None:
    """Return the copies of those inputs that lie elsewhere; None where none does."""
    addresses = tuple(filter(is_address, inputs))
    if not addresses:
        return None
    from manyheads.apps.staging import Staged

    return Staged(addresses, store.spool)


def sample(paths: Sequence[Path], named: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Return some files of the inputs with their sizes, for a worker to see whether it has the same."""
    names = [name for path in paths[:SAMPLE] for name in _spread(contents(path))]
    names = [os.path.abspath(name) for name in chain(names[: 4 * SAMPLE], islice(named, SAMPLE))]
    return tuple((name, os.stat(name).st_size) for name in names if os.path.isfile(name))


def _spread(names: Sequence[str]) -> Sequence[str]:
    return names[:: max(1, len(names) // SAMPLE)]


def contents(path: Path) -> list[str]:
    """Return a file, or all files of a folder, in order; links to folders are not followed."""
    if not path.is_dir():
        return [str(path)] if path.is_file() else []
    found: list[str] = []
    waiting = [str(path)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
    return sorted(found)


def describe_input(path: Path, advance: Advance = lambda number: None) -> dict[str, Any]:
    """Return the name, size and content hash of a file, or of all files of a folder together.

    Args:
        path: The file or folder.
        advance: Told of files as they are read.
    """
    if path.is_file():
        described = {"name": path.name, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
        advance(1)
        return described
    names = contents(path)
    size, digest = _digest(((name, os.path.relpath(name, path)) for name in names), advance)
    return {"name": path.name, "files": len(names), "bytes": size, "sha256": digest}


def describe_named(names: Iterable[str], advance: Advance = lambda number: None) -> dict[str, Any]:
    """Return number, size and content hash of files that the inputs name; a missing one counts as such."""
    count = 0

    def counted() -> Iterator[tuple[str, str]]:
        nonlocal count
        for name in names:
            count += 1
            yield name, ""  # the table, hashed itself, has its name

    size, digest = _digest(counted(), advance)
    return {"name": "files that the inputs name", "files": count, "bytes": size, "sha256": digest}


def _digest(named: Iterable[tuple[str, str]], advance: Advance) -> tuple[int, str]:
    """Return the size and the hash of files, each with the name that counts."""
    whole, total = hashlib.sha256(), 0
    for path, name in named:
        size, content = _hash(path)
        whole.update(json.dumps([name, size, content]).encode())
        total += max(0, size)
        advance(1)
    return total, whole.hexdigest()


def _hash(path: str) -> tuple[int, str]:
    """Return a file's size and hash; -1 where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return -1, ""
            if about.st_size <= SMALL:  # file_digest clears a large buffer each time
                return about.st_size, hashlib.sha256(file.read()).hexdigest()
            return about.st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return -1, ""


def stamp(paths: Sequence[Path], named: Iterable[str] = ()) -> str:
    """Return a hash of the sizes and times of the inputs, to see whether they change while the job runs."""
    digest = hashlib.sha256()
    for name in chain((name for path in paths for name in contents(path)), named):
        try:
            about = os.stat(name)
            digest.update(json.dumps([name, about.st_size, about.st_mtime_ns]).encode())
        except (OSError, ValueError):
            digest.update(json.dumps([name]).encode())
    return digest.hexdigest()
