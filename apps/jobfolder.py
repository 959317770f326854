"""What makes a folder a job's: the lock, `job.json` with the fingerprint, and `_SUCCESS` with the hashes.

Nothing here depends on when or where a job runs, so that a job that was killed and resumed leaves the same
bytes. The input goes into the fingerprint by its content: a time stamp changes when a file is copied or
restored, and may stay when an edit keeps the size; a result mixed from two inputs is the worst outcome, and
reading the input once more costs little beside a model.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from manyheads.apps.parts import Counts, Task
from manyheads.core import files
from manyheads.core.errors import ManyheadsError, UsageError

JOB, SUCCESS, LOCK = "job.json", "_SUCCESS", ".lock"
SOFTWARE = ("manyheads", "pyarrow", "torch")
SMALL = 1 << 20  # bytes of a file that is read at once

Advance: TypeAlias = Callable[[int], None]


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a folder against a second runner; the system gives the lock back however the process ends.

    Raises:
        ManyheadsError: Another runner holds it.
    """
    path = output / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            holder = str(error)
            with suppress(FileNotFoundError):
                holder = path.read_text().strip() or holder
            raise ManyheadsError(f"{output}: another runner is at work here ({holder})") from error
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its holder finished and removed it meanwhile
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(output: Path, resume: bool) -> None:
    """Refuse a folder that this run must not write into.

    Raises:
        UsageError: It holds a job and this is no resume, or it holds other files.
    """
    if (output / JOB).exists():
        if not resume and (output / SUCCESS).exists():
            raise UsageError(f"{output} holds a finished job: choose another folder, or remove this one")
        if not resume:
            raise UsageError(
                f"{output} holds an unfinished job: go on with --resume, or choose another folder"
            )
        return
    others = [file.name for file in output.iterdir() if not file.name.startswith((LOCK, files.TEMPORARY))]
    if others:
        raise UsageError(
            f"{output} is not empty and holds no job (it has {others[0]!r}): choose another folder"
        )


def clear_temporaries(output: Path) -> None:
    """Remove what an ended run left under temporary names."""
    for file in output.glob(f"{files.TEMPORARY}*"):
        files.remove(file)


def resolve_inputs(inputs: Sequence[str], output: Path) -> list[Path]:
    """Return the files and folders that paths and patterns name, patterns in order of name.

    Raises:
        UsageError: One names nothing, or a folder that holds the output.
    """
    found: list[Path] = []
    for each in inputs:
        paths = (
            [Path(each)]
            if Path(each).exists()
            else [Path(path) for path in sorted(glob.glob(each, recursive=True))]
        )
        if not paths:
            raise UsageError(f"no input {each}")
        found += paths
    for path in found:
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"the output {output} lies in the input folder {path}: choose another place")
    return found


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


def describe_job(
    identity: Mapping[str, str],
    options: Mapping[str, str | int],
    inputs: Sequence[Mapping[str, Any]],
    shards: int,
) -> dict[str, Any]:
    """Return what `job.json` says of a job: everything its bytes depend on, and the hash of that."""
    job: dict[str, Any] = {
        "model": dict(identity),
        "options": dict(options),
        "inputs": [dict(each) for each in inputs],
        "software": {name: version(name) for name in SOFTWARE},
        "shards": shards,
    }
    return {**job, "fingerprint": hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()}


def read_job(output: Path) -> dict[str, Any]:
    """Return the folder's `job.json`.

    Raises:
        ManyheadsError: It cannot be read.
    """
    path = output / JOB
    try:
        job = json.loads(path.read_text())
        return {**job, "fingerprint": str(job["fingerprint"]), "threads": int(job["threads"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ManyheadsError(f"{path} is damaged ({error}): start the job again in another folder") from error


def write_job(output: Path, job: Mapping[str, Any]) -> None:
    """Write `job.json`."""
    files.write_atomic(output / JOB, json.dumps(job, indent=1, ensure_ascii=False) + "\n")


def check_same(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue one job with another.

    Raises:
        UsageError: The fingerprints differ; the message says in what.
    """
    if before["fingerprint"] != now["fingerprint"]:
        differing = "; ".join(_differences(before, now)) or "its job.json was changed"
        raise UsageError(f"{output} holds another job, and cannot be resumed as this one: {differing}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("model") != now["model"]:
        names = [each.get("name", "?") for each in (before.get("model", {}), now["model"])]
        yield f"model {names[0]} -> {names[1]}" if names[0] != names[1] else f"another {names[0]} model"
    for section in ("options", "software"):
        for key, value in now[section].items():
            old = before.get(section, {}).get(key)
            if old != value:
                yield f"{key} {old} -> {value}"
    old_inputs, new_inputs = before.get("inputs", []), now["inputs"]
    if len(old_inputs) != len(new_inputs):
        yield f"{len(old_inputs)} inputs -> {len(new_inputs)}"
    for old, new in zip(old_inputs, new_inputs, strict=False):
        if old != new:
            renamed = "" if old["name"] == new["name"] else f" instead of {old['name']}"
            yield (
                f"input {new['name']}{renamed} has other content"
                if not renamed
                else f"input {new['name']}{renamed}"
            )


def finish(task: Task, counts: Counts, also: Sequence[Path] = ()) -> None:
    """Write `_SUCCESS`: the totals and the hash of every part and bad file.

    Args:
        task: The job.
        counts: Its totals.
        also: Further files of the folder that belong to the result.
    """
    names = [task.part(index) for index in range(task.total)]
    names += [task.bad(index) for index in range(task.total) if task.bad(index).exists()]
    manifest = {
        "fingerprint": task.fingerprint,
        "shards": task.total,
        "records": counts.records,
        "rows": counts.rows,
        "bad": counts.bad,
        "files": {path.relative_to(task.output).as_posix(): files.sha256(path) for path in (*names, *also)},
    }
    task.reach("success", task.total)
    files.write_atomic(task.output / SUCCESS, json.dumps(manifest, indent=1) + "\n")


def finished(task: Task) -> Counts | None:
    """Verify a finished job against its `_SUCCESS`.

    Returns:
        Its totals; None where the job is not finished, or no longer: then `_SUCCESS` and the damaged files
        are gone.
    """
    success = task.output / SUCCESS
    if not success.exists():
        return None
    try:
        manifest = json.loads(success.read_text())
        wanted = dict(manifest["files"])
        counts = Counts(manifest["records"], manifest["rows"], manifest["bad"])
    except (ValueError, KeyError, TypeError):
        wanted, counts = {}, Counts()
    paths = {task.part(index) for index in range(task.total)}
    paths |= {task.bad(index) for index in range(task.total)}
    paths |= {task.output / name for name in wanted}
    there = [path for path in sorted(paths) if path.exists()]
    wrong = [
        path for path in there if files.sha256(path) != wanted.get(path.relative_to(task.output).as_posix())
    ]
    if not wrong and all((task.output / name).exists() for name in wanted) and len(wanted) >= task.total:
        return counts
    for path in (success, *wrong):
        path.unlink(missing_ok=True)
    return None
