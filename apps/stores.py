"""Where a job's output lies: a local folder, or a folder of any file system that fsspec knows.

In both, files get their final names whole, the ones that belong to a part before it, and `_SUCCESS` last.

- A local folder: a file is written beside under a temporary name, flushed, and renamed, which is atomic.
- Elsewhere there is no rename to rely on: object stores copy instead. A shard is written to this machine's
  disk first and then stored under its final name in one piece. S3, GCS and Azure show an object when all of
  it has arrived, not before. On file systems that do show half of it (SFTP, WebDAV) a killed job leaves half
  a part, and that is found: a part counts if its footer, page checksums and files are right, else it is made
  again. So nothing but the order of the steps is asked of the file system; who reads the output while the job
  runs should wait for `_SUCCESS`, which has the hash of every file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from manyheads.apps import locks
from manyheads.core import datasets, files
from manyheads.core.errors import ManyheadsError, UsageError

BLOCK = 1 << 20


class Store(Protocol):
    """A job's folder; names are relative to it, with slashes."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def shared(self) -> bool:
        """Whether other processes see it."""

    @property
    def spool(self) -> Path:
        """The folder of this machine for what the job needs meanwhile; there may be none."""

    def opened(self) -> Any:
        """Context: make the folder, and remove it again if the job never came to write into it."""

    def locked(self, run: str) -> Any:
        """Context: hold the folder against a second runner; gives a `locks.Lock`."""

    def at_work(self) -> str | None:
        """Return the text of a runner's lock; None where none is at work."""

    def scratch(self, name: str) -> Path:
        """Return the path under which this process writes a file or folder before it gets its name."""

    def commit(self, written: Path, name: str) -> None:
        """Give a file or folder its name, in place of what has it."""

    def clear(self) -> None:
        """Remove what an ended run of this machine left under temporary names."""

    def names(self) -> dict[str, float]:
        """Return the names in the folder, with the times at which they were written."""

    def below(self, name: str) -> list[str]:
        """Return the names of all files below a folder, in order."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""

    def fetch(self, name: str, folder: Path) -> None:
        """Have a folder's files below a local folder, under the same name."""

    def create(self, name: str, text: str) -> bool:
        """Write a file if there is none; False where there is one."""

    def write(self, name: str, text: str) -> None:
        """Write a small text file."""

    def read(self, name: str) -> str | None:
        """Return a file's text; None where there is none."""

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""


def is_address(text: str) -> bool:
    """Whether a text is an address of a file system, as in s3://bucket/folder, no path."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.isidentifier() and scheme not in ("file", "local")


def local_path(text: str) -> Path:
    """Return the path that a text names: itself, or a file:// address of one."""
    for scheme in ("file://", "local://"):
        if text.startswith(scheme):
            return Path(text[len(scheme) :])
    return Path(text)


def open_store(output: Path | str) -> Store:
    """Return the store of an output folder or address."""
    text = str(output)
    if not is_address(text):
        return LocalStore(local_path(text))
    from manyheads.apps.remote import RemoteStore

    return RemoteStore(text.rstrip("/"))


def sha256(store: Store, name: str) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with store.open(name) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def spool_folder(name: str) -> Path:
    """Return the folder of the cache for what a job needs meanwhile."""
    return datasets.cache_folder() / "jobs" / hashlib.sha256(name.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine.

    Args:
        root: The folder.
    """

    root: Path
    shared = True

    @property
    def name(self) -> str:
        """What users call it."""
        return str(self.root)

    @property
    def spool(self) -> Path:
        """Where inputs are kept that come from elsewhere."""
        return spool_folder(str(self.root.resolve()))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, and remove it again if the job never came to write into it."""
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root} is a file: choose a folder for the output")
        made = not self.root.exists()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ManyheadsError(f"cannot make the folder {self.root}: {error.strerror}") from error
        try:
            yield
        finally:
            if made:
                with suppress(OSError):  # it has files
                    self.root.rmdir()

    @contextmanager
    def locked(self, run: str) -> Iterator[locks.Lock]:
        """Hold the folder by the system's lock, or by a lease where the file system has none."""
        try:
            context = locks.flocked(self.root / locks.LOCK, run)
            lock = context.__enter__()
        except locks.NoFlock:
            context = locks.leased(self, run)
            lock = context.__enter__()
        try:
            yield lock
        finally:
            context.__exit__(None, None, None)

    def at_work(self) -> str | None:
        """Return the text of a runner's lock; None where none is at work."""
        return self.read(locks.LOCK) if locks.is_flocked(self.root / locks.LOCK) else None

    def scratch(self, name: str) -> Path:
        """Return the temporary name beside."""
        return files.temporary(self.root / name)

    def commit(self, written: Path, name: str) -> None:
        """Flush and rename."""
        path = self.root / name
        if written.is_dir():
            files.remove(path)
            files.replace_folder(written, path)
        else:
            files.flush(written)
            files.commit(written, path)

    def clear(self) -> None:
        """Remove temporary names."""
        for file in self.root.glob(f"{files.TEMPORARY}*"):
            files.remove(file)

    def names(self) -> dict[str, float]:
        """Return the names in the folder, with the times at which they were written."""
        with os.scandir(self.root) as entries:
            return {entry.name: entry.stat().st_mtime for entry in entries}

    def below(self, name: str) -> list[str]:
        """Return the names of all files below a folder, in order."""
        found = (path for path in (self.root / name).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return (self.root / name).exists()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return (self.root / name).open("rb")

    def fetch(self, name: str, folder: Path) -> None:
        """Nothing: they are there."""

    def create(self, name: str, text: str) -> bool:
        """Write a file if there is none."""
        try:
            with (self.root / name).open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, text: str) -> None:
        """Write a small text file: readers see all of it or none."""
        files.write_atomic(self.root / name, text)

    def read(self, name: str) -> str | None:
        """Return a file's text; None where there is none."""
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        files.remove(self.root / name)
