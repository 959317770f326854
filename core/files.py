"""Files that are either whole or not there: write, flush to the disk, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path

TEMPORARY = ".tmp-"  # a leading dot: readers of a folder of parquet files pass over it


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary(path: Path) -> Path:
    """Return the name beside `path` under which this process writes it.

    No other process uses the same, on other machines that share the folder neither.
    """
    return path.with_name(f"{TEMPORARY}{_process()}-{path.name}")


def _process() -> str:
    machine = "".join(letter for letter in socket.gethostname() if letter.isalnum())
    return f"{machine[-20:]}-{os.getpid()}"


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(written: Path, path: Path) -> None:
    """Give a file, flushed before, its final name, for good."""
    written.replace(path)
    flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: str) -> None:
    """Write a small text file: readers see all of it or none."""
    written = temporary(path)
    written.write_text(content, encoding="utf-8")
    flush(written)
    commit(written, path)


def replace_folder(written: Path, path: Path) -> None:
    """Give a folder its final name, in place of the folder that has it.

    A crash between the two renames leaves the old folder beside, under a temporary name.
    """
    for file in written.rglob("*"):
        flush(file)
    flush(written)
    if not path.exists():
        commit(written, path)
        return
    old = path.with_name(f"{TEMPORARY}{_process()}-old-{path.name}")
    path.rename(old)
    try:
        commit(written, path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)
