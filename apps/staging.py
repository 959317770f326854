"""Inputs from elsewhere: copied to this machine before a job starts, and removed when it is done.

The copies lie in the job's spool folder below the path that they have in their own file system, so that a
table finds the files that it names beside it. A file that is there with the right size, and of the version
that the file system tells of, is not copied again: a job that goes on does not start from nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import posixpath
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from manyheads.apps.progress import Count
from manyheads.apps.remote import file_system, reached
from manyheads.core import files
from manyheads.core.errors import ManyheadsError, UsageError

FOLDER, LIST, LOCK = "inputs", "copied.json", "copying.lock"
AT_ONCE = 8  # copies
MB = 10**6
MUCH = 20 * MB  # takes long enough to say so
TRIES, PAUSE_S = 3, 1.0  # of a copy


@dataclass(frozen=True)
class Staged:
    """The copies of a job's inputs.

    Args:
        addresses: Files, folders or patterns.
        spool: The job's folder of this machine, and of every other that works at it.
    """

    addresses: tuple[str, ...]
    spool: Path

    @property
    def root(self) -> Path:
        """What the copies lie below."""
        return self.spool / FOLDER

    def fetch(self, quiet: bool = True) -> list[Path]:
        """Copy what is not there yet.

        Returns:
            The files and folders that the addresses name, patterns in order of name.

        Raises:
            UsageError: An address names nothing, or the disk has no room for it.
            ManyheadsError: A copy failed.
        """
        found: list[Path] = []
        wanted: dict[Path, tuple[Any, str, dict[str, Any]]] = {}
        for address in self.addresses:
            system, roots = expand(address)
            for root in roots:
                base = self._local(address, root)
                infos = reached(address, lambda system=system, root=root: _listing(system, root))
                copies = {self._local(address, path): (system, path, info) for path, info in infos.items()}
                wanted |= copies
                found.append(base)
        with self._alone():
            for base in found:
                _prune(base, wanted)
            self._copy(wanted, quiet)
        return found

    def fetch_named(self, names: Iterable[str]) -> None:
        """Copy the files that a copied table names; one that does not exist stays away.

        Raises:
            ManyheadsError: A copy failed.
        """
        schemes = {self._scheme(address): address for address in self.addresses}
        wanted: dict[Path, tuple[Any, str, dict[str, Any]]] = {}
        for name in names:
            path = Path(posixpath.normpath(name))
            if not path.is_relative_to(self.root) or path.exists():
                continue
            scheme, *parts = path.relative_to(self.root).parts
            if scheme not in schemes or not parts:
                continue
            system, root = file_system(schemes[scheme])
            target = ("/" if root.startswith("/") else "") + "/".join(parts)
            try:
                info = reached(schemes[scheme], lambda system=system, target=target: system.info(target))
            except FileNotFoundError:
                continue
            if info["type"] == "file":
                wanted[path] = (system, target, info)
        with self._alone():
            self._copy(wanted, quiet=True)

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """The beginnings of the copies' paths, each with that of the addresses that it stands for."""
        schemes = sorted({self._scheme(address) for address in self.addresses})
        return tuple((f"{self.root}/{scheme}/", f"{scheme}://") for scheme in schemes)

    def has(self, path: str) -> bool:
        """Whether a path is one of the copies'."""
        return Path(path).is_relative_to(self.root)

    def _scheme(self, address: str) -> str:
        return address.partition("://")[0]

    def _local(self, address: str, path: str) -> Path:
        inside = self.root / self._scheme(address) / path.lstrip("/")
        if ".." in inside.parts:
            raise UsageError(f"{address}: a path with `..` is not copied")
        return inside

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the copies against the other workers of this machine."""
        self.spool.mkdir(parents=True, exist_ok=True)
        with (self.spool / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @cached_property
    def _versions(self) -> dict[str, str]:
        """What is known of the files that were copied."""
        try:
            return dict(json.loads((self.spool / LIST).read_text()))
        except (OSError, ValueError):
            return {}

    def _copy(self, wanted: Mapping[Path, tuple[Any, str, dict[str, Any]]], quiet: bool) -> None:
        self.__dict__.pop("_versions", None)  # another worker may have copied meanwhile
        missing = {
            path: each
            for path, each in wanted.items()
            if not path.is_file()
            or path.stat().st_size != each[2]["size"]
            or self._versions.get(self._key(path)) != version(each[2])
        }
        if not missing:
            return
        size = sum(int(info["size"]) for _, _, info in missing.values())
        free = shutil.disk_usage(self.spool).free
        if size > free:
            raise UsageError(
                f"the inputs are {size / 1e9:.2f} GB, and {self.spool} has room for {free / 1e9:.2f}:"
                " let MANYHEADS_CACHE name a larger disk"
            )
        quiet, copied = quiet or size < MUCH, 0
        with Count(size // MB, "MB of inputs copied", quiet) as count, ThreadPoolExecutor(AT_ONCE) as pool:
            copies = [pool.submit(_copy_one, path, *each) for path, each in missing.items()]
            try:
                for path, copy in zip(missing, copies, strict=True):
                    copy.result()
                    self._versions[self._key(path)] = version(missing[path][2])
                    copied += int(missing[path][2]["size"])
                    count.advance(copied // MB - count.done)
            finally:
                for copy in copies:
                    copy.cancel()
                files.write_atomic(self.spool / LIST, json.dumps(self._versions))

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def expand(address: str) -> tuple[Any, list[str]]:
    """Return an address's file system, and the paths in it that it names, patterns in order of name.

    Raises:
        UsageError: It names nothing.
    """
    system, path = file_system(address)
    found = [path.rstrip("/")]
    if not reached(address, lambda: system.exists(path)):
        found = sorted(reached(address, lambda: system.glob(path))) if set(path) & set("*?[") else []
    if not found:
        raise UsageError(f"no input {address}")
    return system, found


def version(info: Mapping[str, Any]) -> str:
    """Return a hash of what a file system tells of a file; it changes when the file does."""
    known = json.dumps({key: str(value) for key, value in info.items()}, sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def clear(spool: Path) -> None:
    """Remove what a job that is done kept on this machine."""
    shutil.rmtree(spool, ignore_errors=True)


def _listing(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Return the files that a path names, itself or all below, with what the file system tells of them."""
    system.invalidate_cache()
    info = system.info(root)
    if info["type"] == "file":
        return {root: info}
    found = system.find(root, detail=True)
    return {path: about for path, about in found.items() if about["type"] == "file" and path[-1] != "/"}


def _prune(base: Path, wanted: Mapping[Path, object]) -> None:
    """Remove copies of files that are no longer there."""
    if base.is_dir():
        for path in base.rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()
    elif base not in wanted:
        base.mkdir(parents=True, exist_ok=True)  # a folder, perhaps without files


def _copy_one(path: Path, system: Any, source: str, info: Mapping[str, Any]) -> None:
    """Copy a file, in a few tries; it appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written, why = files.temporary(path), ""
    for number in range(TRIES):
        time.sleep(number * PAUSE_S)
        try:
            system.get_file(source, str(written))
            size = written.stat().st_size
            if size == info["size"]:
                written.replace(path)
                return
            why = f"{size} bytes came of {info['size']}"
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
    files.remove(written)
    raise ManyheadsError(f"{source} cannot be copied: {why[:300]}; go on with --resume")
