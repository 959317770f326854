"""One runner a job: the lock in the output folder.

The file `.lock` says who holds it, and the run's own number. On a local folder the system's `flock` decides,
which a process loses however it ends. Where there is none (object stores, some network file systems) it is a
lease: the holder writes the file again every few seconds, and another runner takes it over once it has not
changed for `PATIENCE` of these, which needs no clocks that agree. The file is created exclusively where the
file system can (S3, GCS, Azure, local folders: the second of two that start together is refused); elsewhere
both write, wait, and the one whose number is left goes on.

A lease can be lost while its holder sleeps or is cut off. So every worker looks for its run's number in
`.lock` before it gives a part its name: a runner that was replaced can store nothing more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from manyheads.core.errors import ManyheadsError

LOCK = ".lock"
BEAT_S = 5.0  # between two writings of a lease
PATIENCE = 4  # beats that may be missing
SETTLE_S = 1.0  # after taking a lease over, before looking who has it
TRIES, PAUSE_S = 3, 0.1  # for a lock that somebody is only looking at
LOOKS, LOOK_S = 10, 0.05  # at a lease that may be half written
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class Lock:
    """A lock that is held."""

    def __init__(self) -> None:
        self.lost_to: str | None = None

    def check(self) -> None:
        """Raise if another runner has taken it over."""
        if self.lost_to is not None:
            raise ManyheadsError(f"another runner took this job over ({self.lost_to})")


class Place(Protocol):
    """What a lease needs of a job's folder."""

    @property
    def name(self) -> str:
        """What users call it."""

    def create(self, name: str, text: str) -> bool:
        """Write a file if there is none; False where there is one."""

    def write(self, name: str, text: str) -> None:
        """Write a file."""

    def read(self, name: str) -> str | None:
        """Return a file's text; None where there is none."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""


def describe(run: str) -> str:
    """Return what a lock says of its holder."""
    return f"pid {os.getpid()} on {socket.gethostname()}\nrun {run}\nsince {int(time.time())}\n"


def is_of(text: str | None, run: str) -> bool:
    """Whether a lock's text is that of a run."""
    return text is not None and f"run {run}\n" in text


def holder(text: str | None) -> str:
    """Return who a lock's text names."""
    return (text or "").partition("\n")[0] or "unknown"


def settled(place: Place) -> str | None:
    """Return a lock's text; None where there is none.

    Where files are not written at once its holder's next beat may be half there: then look again.
    """
    for number in range(LOOKS):
        time.sleep(LOOK_S if number else 0.0)
        text = place.read(LOCK)
        if text is not None and "\nsince " in text and text.endswith("\n"):
            break
    return text


class NoFlock(Exception):
    """The file system has no `flock`."""


@contextmanager
def flocked(path: Path, run: str) -> Iterator[Lock]:
    """Hold a file's `flock`.

    Raises:
        ManyheadsError: Another runner holds it.
        NoFlock: The file system has none.
    """
    descriptor = _flock(path)
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, describe(run).encode())
        yield Lock()
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _flock(path: Path) -> int:
    tries = 0
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # its holder finished and removed it meanwhile
        except OSError as error:
            os.close(descriptor)
            if error.errno not in TAKEN:
                raise NoFlock(str(error)) from error
            tries += 1
            if tries == TRIES:
                who = holder(path.read_text() if path.exists() else None)
                raise _taken(str(path.parent), who) from error
            time.sleep(PAUSE_S)


def is_flocked(path: Path) -> bool:
    """Whether a process of this machine, or of the file system's others, holds a file's `flock`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in TAKEN
    finally:
        os.close(descriptor)
    return False


def _taken(place: str, who: str) -> ManyheadsError:
    return ManyheadsError(f"{place}: another runner is at work here ({who})")


@contextmanager
def leased(place: Place, run: str) -> Iterator[Lock]:
    """Hold a lease.

    Raises:
        ManyheadsError: Another runner holds it, and is alive.
    """
    _take(place, run)
    lock, ended = Lock(), threading.Event()
    beating = threading.Thread(target=_beat, args=(place, run, lock, ended), daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        ended.set()
        beating.join()
        if is_of(settled(place), run):  # and not that of one who took it over
            place.remove(LOCK)


def _take(place: Place, run: str) -> None:
    if place.create(LOCK, describe(run)):
        return
    before = place.read(LOCK)
    end = time.monotonic() + PATIENCE * BEAT_S
    while before is not None and time.monotonic() < end:
        time.sleep(BEAT_S / 4)
        now = place.read(LOCK)
        if now is not None and now != before:
            raise _taken(place.name, holder(now))
        before = now
    place.write(LOCK, describe(run))
    time.sleep(SETTLE_S)
    now = place.read(LOCK)
    if not is_of(now, run):
        raise _taken(place.name, holder(now))


def _beat(place: Place, run: str, lock: Lock, ended: threading.Event) -> None:
    """Write the lease again and again, with the number of the beat; stop where it is another's."""
    text, number = describe(run), 0
    while not ended.wait(BEAT_S):
        with suppress(Exception):  # a network that fails now may do the next time
            now = place.read(LOCK)
            if now is not None and not is_of(now, run):
                lock.lost_to = holder(now)
                return
            number += 1
            place.write(LOCK, f"{text}beat {number} at {time.time():.0f}\n")
