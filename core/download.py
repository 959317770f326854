"""Downloads that go on where they broke off, and are compared with a known hash before they get their name.

A file `NAME` that is under way is `.NAME.part`, with `.NAME.part.json` beside it: size, hash and ETag of what
is being received. A later call asks for the rest alone (`Range`, `If-Range`), and begins anew where the
server has another file now. huggingface_hub does neither across calls nor looks at content: it is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manyheads.core import files
from manyheads.core.errors import DataError, ManyheadsError
from manyheads.core.network import (
    BLOCK,
    RETRIED,
    Answer,
    Broken,
    NetworkError,
    Refused,
    blocks,
    host,
    open_address,
    wait,
)

STEP = 1 << 16  # bytes after which a broken connection counts as progress
SPARE = 64 << 20  # bytes that stay free on the disk
RESTARTS = 2  # downloads of other bytes than the hash says, after which it is given up


@dataclass(frozen=True)
class Wanted:
    """A file to download.

    Args:
        address: Where it is.
        size: Its bytes.
        sha256: Its hash, or
        git_sha1: its hash as git names it: SHA-1 over a header and the content.
        commit: What the server's `X-Repo-Commit` must say, where it says anything.
    """

    address: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    commit: str | None = None


def download(
    wanted: Wanted,
    target: Path,
    headers: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda received: None,
) -> str:
    """Download a file to its place; only one process at a time may do so.

    Args:
        wanted: What and where from.
        target: Its place; a part of an earlier call beside it is continued.
        headers: Of the request, such as a token's.
        progress: Called with the bytes that are there.

    Returns:
        The SHA-256 of the content.

    Raises:
        Refused: The server answers with an error that no further try would change.
        NetworkError: It cannot be had; what came stays for the next call.
        DataError: The server sends other bytes than the hash says; nothing is kept.
        ManyheadsError: No room on the disk.
    """
    part = _Part(target, wanted)
    tries, wrong, reached = 0, 0, part.size
    while True:
        try:
            _receive(part, headers or {}, progress)
            if part.matches():
                return part.commit()
            part.discard()
            wrong, reached = wrong + 1, 0
            if wrong == RESTARTS:
                raise DataError(
                    f"{host(wanted.address)} sends other bytes for {target.name} than it lists"
                    f" ({'SHA-256' if wanted.sha256 else 'git hash'} differs, twice); nothing was kept"
                )
        except (Broken, Refused) as error:
            if isinstance(error, Refused) and error.status == 416:
                part.discard()
            elif isinstance(error, Refused) and error.status not in RETRIED:
                raise
            # Counted from where it last got on: a server without ranges that always breaks off gets nowhere.
            tries += 1
            if part.size >= reached + STEP:
                tries, reached = 1, part.size
            wait(tries, error)
        except OSError as error:
            raise ManyheadsError(f"cannot write {target.parent} ({error.strerror or error})") from error


class _Part:
    """What has come of a file so far."""

    def __init__(self, target: Path, wanted: Wanted) -> None:
        self.target, self.wanted = target, wanted
        self.path = target.with_name(f".{target.name}.part")
        self.side = target.with_name(f".{target.name}.part.json")
        self.etag = ""
        self._hashes()
        self._continue()
        free = shutil.disk_usage(target.parent).free
        if free < wanted.size - self.size + SPARE:
            raise ManyheadsError(
                f"{target.name} has {wanted.size / 1e6:.1f} MB, and {target.parent} has room for"
                f" {max(0, free - SPARE) / 1e6:.1f} MB: make room, or set MANYHEADS_CACHE to another disk"
            )

    def _hashes(self) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.git = hashlib.sha1(b"blob %d\0" % self.wanted.size, usedforsecurity=False)

    def _continue(self) -> None:
        """Take up a part of an earlier call, if it is one of the same file."""
        try:
            known = {} if self.side.is_symlink() else json.loads(self.side.read_bytes())
            same = isinstance(known, dict) and all(known.get(key) == value for key, value in self._about())
            if not same or not self.path.is_file() or self.path.is_symlink():
                raise ValueError
            self.etag = str(known.get("etag", ""))
            if not re.fullmatch(r"[\x21-\x7e]{0,200}", self.etag):
                raise ValueError
            with self.path.open("rb") as file:
                while block := file.read(BLOCK):
                    self._count(block)
        except (OSError, ValueError, RecursionError):
            self.discard()

    def _about(self) -> list[tuple[str, object]]:
        return [("size", self.wanted.size), ("hash", self.wanted.sha256 or self.wanted.git_sha1)]

    def _count(self, block: bytes) -> None:
        self.size += len(block)
        self.sha256.update(block)
        if self.wanted.sha256 is None:
            self.git.update(block)
        if self.size > self.wanted.size:
            raise ValueError("too long")

    def begin(self, etag: str) -> None:
        """Start anew, from the answer of this ETag."""
        self.discard()
        self.etag = etag if re.fullmatch(r"[\x21-\x7e]{0,200}", etag) else ""
        files.write_atomic(self.side, json.dumps(dict(self._about()) | {"etag": self.etag}))

    def write(self, answer: Answer, progress: Callable[[int], None]) -> None:
        """Append an answer's body.

        Raises:
            Broken: It ends early, or comes too slowly to ever end.
            NetworkError: It is longer than the file.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        there = host(self.wanted.address)
        with os.fdopen(os.open(self.path, flags, 0o644), "ab") as file:
            for block in blocks(answer.response, there):
                if self.size + len(block) > self.wanted.size:
                    self.discard()
                    raise NetworkError(f"{there} sends more than it lists: nothing was kept")
                file.write(block)
                self._count(block)
                progress(self.size)
        if self.size < self.wanted.size:
            raise Broken(f"{there}: {self.target.name} broke off at {self.size} bytes")

    def matches(self) -> bool:
        """Tell whether the content is what it should be."""
        if self.wanted.sha256 is not None:
            return self.sha256.hexdigest() == self.wanted.sha256
        return self.git.hexdigest() == self.wanted.git_sha1

    def commit(self) -> str:
        """Give the file its name; returns its SHA-256."""
        files.flush(self.path)
        files.commit(self.path, self.target)
        self.side.unlink(missing_ok=True)
        return self.sha256.hexdigest()

    def discard(self) -> None:
        """Remove all of it."""
        for path in (self.path, self.side):
            path.unlink(missing_ok=True)
        self.etag = ""
        self._hashes()


def _receive(part: _Part, headers: Mapping[str, str], progress: Callable[[int], None]) -> None:
    """Ask for what is missing, and append it."""
    wanted = part.wanted
    progress(part.size)
    if part.size == wanted.size and part.path.exists():
        return
    asked = dict(headers)
    if part.size:
        asked["Range"] = f"bytes={part.size}-"
        if part.etag.startswith('"'):  # a weak one does not tell bytes apart
            asked["If-Range"] = part.etag
    answer = open_address(wanted.address, asked)
    with answer.response as response:
        commit = answer.first.get("X-Repo-Commit")
        if wanted.commit is not None and commit not in (None, wanted.commit):
            raise NetworkError(f"{host(wanted.address)} answers for another commit than {wanted.commit}")
        etag = response.headers.get("ETag", "")
        if response.status == 206 and part.size:
            whole = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if whole is None or int(whole[1]) != part.size or etag != part.etag:
                part.discard()
                raise Broken(f"{host(wanted.address)} has another {part.target.name} now")
        elif response.status == 200:
            part.begin(etag)
        else:
            raise NetworkError(f"{host(wanted.address)} answers {response.status}, not with a file")
        length = response.headers.get("Content-Length")
        if response.status == 200 and length is not None and length != str(wanted.size):
            part.discard()
            raise Broken(f"{host(wanted.address)} announces {length[:20]} bytes, and lists {wanted.size}")
        part.write(answer, progress)
