"""A job's output on a file system that fsspec knows; what is asked of it stands in `stores`."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from manyheads.apps import locks
from manyheads.apps.stores import spool_folder
from manyheads.core import files
from manyheads.core.errors import ManyheadsError, UsageError

# Buckets are not a job's to make, and folders in them need no making.
OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory"))


@dataclass(frozen=True)
class RemoteStore:
    """A folder of a file system that fsspec knows.

    Args:
        name: Its address; keys and endpoints come from fsspec's configuration.
    """

    name: str

    @property
    def scheme(self) -> str:
        """What stands before the colon."""
        return self.name.partition("://")[0]

    @property
    def shared(self) -> bool:
        """A process's memory is its own."""
        return self.scheme != "memory"

    @cached_property
    def spool(self) -> Path:
        """Where shards are written before they are stored, and inputs are kept that come from elsewhere."""
        folder = spool_folder(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return file_system(self.name)

    def _path(self, name: str) -> str:
        return posixpath.join(self._place[1], name)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """See whether the place can be read; folders are made where they are needed."""
        file_system, root = self._place
        if reached(self.name, lambda: file_system.isfile(root)):
            raise UsageError(f"{self.name} is a file: choose a folder for the output")
        if self.scheme not in OBJECTS:
            reached(self.name, lambda: file_system.makedirs(root, exist_ok=True))
        yield

    def locked(self, run: str) -> Any:
        """Hold the folder by a lease."""
        return locks.leased(self, run)

    def at_work(self) -> str | None:
        """Return the text of a lease that was written lately, by this machine's clock.

        Leases tell whole seconds.
        """
        text = locks.settled(self)
        if not text:
            return None
        last = text.split()[-1]
        fresh = last.isdecimal() and time.time() - int(last) <= locks.BEAT_S * locks.PATIENCE + 1
        return text if fresh else None

    def scratch(self, name: str) -> Path:
        """Return a path on this machine's disk."""
        return files.temporary(self.spool / name)

    def commit(self, written: Path, name: str) -> None:
        """Store under the final name, and look whether all of it arrived."""
        if written.is_dir():
            self.remove(name)
            for path in sorted(path for path in written.rglob("*") if path.is_file()):
                self._put(path, f"{name}/{path.relative_to(written).as_posix()}")
        else:
            self._put(written, name)
        files.remove(written)

    def _put(self, path: Path, name: str) -> None:
        file_system, target = self._place[0], self._path(name)
        self._make_parent(target)
        file_system.put_file(str(path), target)
        size, wanted = file_system.size(target), path.stat().st_size
        if size != wanted:
            raise ManyheadsError(f"{self.name}/{name}: {wanted} bytes were stored, {size} are there")

    def _make_parent(self, target: str) -> None:
        if self.scheme not in OBJECTS:
            self._place[0].makedirs(posixpath.dirname(target), exist_ok=True)

    def clear(self) -> None:
        """Remove temporary names from this machine's disk."""
        for file in self.spool.glob(f"{files.TEMPORARY}*"):
            files.remove(file)

    def names(self) -> dict[str, float]:
        """Return the names in the folder, with the times at which they were written."""
        file_system, root = self._place
        file_system.invalidate_cache()
        try:
            found = reached(self.name, lambda: file_system.ls(root, detail=True))
        except FileNotFoundError:
            return {}
        inside = [info for info in found if info["name"].rstrip("/") != root.rstrip("/")]
        return {posixpath.basename(info["name"].rstrip("/")): written_at(info) for info in inside}

    def below(self, name: str) -> list[str]:
        """Return the names of all files below a folder, in order."""
        file_system, root = self._place
        file_system.invalidate_cache()
        found = file_system.find(self._path(name))
        return sorted(posixpath.relpath(path, root) for path in found)

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        self._place[0].invalidate_cache()
        return bool(self._place[0].exists(self._path(name)))

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return cast(IO[bytes], self._place[0].open(self._path(name), "rb"))

    def fetch(self, name: str, folder: Path) -> None:
        """Copy a folder's files below a local folder."""
        for each in self.below(name):
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            self._place[0].get_file(self._path(each), str(folder / each))

    def create(self, name: str, text: str) -> bool:
        """Write a file if there is none: exclusively where the file system can."""
        target = self._path(name)
        self._make_parent(target)

        def pipe() -> bool:
            try:
                self._place[0].pipe_file(target, text.encode(), mode="create")
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise ManyheadsError(f"{self.name} cannot be written: {error}") from error
            return True

        return bool(reached(self.name, pipe))

    def write(self, name: str, text: str) -> None:
        """Write a small text file in one piece."""
        target = self._path(name)
        self._make_parent(target)
        self._place[0].pipe_file(target, text.encode())

    def read(self, name: str) -> str | None:
        """Return a file's text; None where there is none."""
        try:
            return bytes(self._place[0].cat_file(self._path(name))).decode()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        with suppress(FileNotFoundError):
            self._place[0].invalidate_cache()
            self._place[0].rm(self._path(name), recursive=True)


def file_system(address: str) -> tuple[Any, str]:
    """Return an address's file system and the path in it.

    Raises:
        UsageError: fsspec does not know it, or needs a package for it.
    """
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UsageError(f"{address}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UsageError(f"{address}: {error}") from error
    return found, str(path)


def written_at(info: dict[str, Any]) -> float:
    """Return when a file was written, in seconds since 1970, as its file system tells it; 0 if not at all."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if value is not None and hasattr(value, "timestamp"):
            return float(value.timestamp())
    return 0.0


def reached(name: str, call: Any) -> Any:
    """Call a file system; what it cannot do is told in a line."""
    try:
        return call()
    except (FileNotFoundError, FileExistsError, ManyheadsError):
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ManyheadsError(f"{name} cannot be used: {why[:300]}") from error
