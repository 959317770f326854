"""What makes a folder a job's: `job.json` with the fingerprint, and `_SUCCESS` with the hashes.

Nothing here depends on when or where a job runs, so that a job that was killed and resumed leaves the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from manyheads.apps.locks import LOCK
from manyheads.apps.parts import Counts, Task
from manyheads.apps.stores import Store, sha256
from manyheads.core import files
from manyheads.core.errors import ManyheadsError, UsageError

JOB, SUCCESS = "job.json", "_SUCCESS"
SOFTWARE = ("manyheads", "pyarrow", "torch")


def check_free(output: Store, resume: bool) -> None:
    """Refuse a folder that this run must not write into.

    Raises:
        UsageError: It holds a job and this is no resume, or it holds other files.
    """
    names = output.names()
    if JOB in names:
        if not resume and SUCCESS in names:
            raise UsageError(f"{output.name} holds a finished job: choose another folder, or remove this one")
        if not resume:
            raise UsageError(
                f"{output.name} holds an unfinished job: go on with --resume, or choose another folder"
            )
        return
    others = sorted(name for name in names if not name.startswith((LOCK, files.TEMPORARY)))
    if others:
        raise UsageError(
            f"{output.name} is not empty and holds no job (it has {others[0]!r}): choose another folder"
        )


def software() -> dict[str, str]:
    """Return the versions that a job's bytes depend on."""
    return {name: version(name) for name in SOFTWARE}


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
        "software": software(),
        "shards": shards,
    }
    return {**job, "fingerprint": hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()}


def read_job(output: Store) -> dict[str, Any]:
    """Return the folder's `job.json`.

    Raises:
        ManyheadsError: It cannot be read.
    """
    text = output.read(JOB)
    try:
        job = json.loads(text or "")
        return {**job, "fingerprint": str(job["fingerprint"]), "threads": int(job["threads"])}
    except (ValueError, KeyError, TypeError) as error:
        path = f"{output.name}/{JOB}"
        raise ManyheadsError(f"{path} is damaged ({error}): start the job again in another folder") from error


def write_job(output: Store, job: Mapping[str, Any]) -> None:
    """Write `job.json`."""
    output.write(JOB, json.dumps(job, indent=1, ensure_ascii=False) + "\n")


def check_same(output: Store, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue one job with another.

    Raises:
        UsageError: The fingerprints differ; the message says in what.
    """
    if before["fingerprint"] != now["fingerprint"]:
        differing = "; ".join(_differences(before, now)) or "its job.json was changed"
        raise UsageError(f"{output.name} holds another job, and cannot be resumed as this one: {differing}")


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


def finish(task: Task, counts: Counts, also: Mapping[str, str]) -> None:
    """Write `_SUCCESS`: the totals and the hash of every part and bad file.

    Args:
        task: The job.
        counts: Its totals.
        also: Further files of the folder that belong to the result, with their hashes.
    """
    there = task.store.names()
    names = [task.part(index) for index in range(task.total)]
    names += [task.bad(index) for index in range(task.total) if task.bad(index) in there]
    manifest = {
        "fingerprint": task.fingerprint,
        "shards": task.total,
        "records": counts.records,
        "rows": counts.rows,
        "bad": counts.bad,
        "files": {**{name: sha256(task.store, name) for name in names}, **also},
    }
    task.reach("success", task.total)
    task.store.write(SUCCESS, json.dumps(manifest, indent=1) + "\n")


def finished(task: Task) -> Counts | None:
    """Verify a finished job against its `_SUCCESS`.

    Returns:
        Its totals; None where the job is not finished, or no longer: then `_SUCCESS` and the damaged files
        are gone.
    """
    text = task.store.read(SUCCESS)
    if text is None:
        return None
    try:
        manifest = json.loads(text)
        wanted = dict(manifest["files"])
        counts = Counts(manifest["records"], manifest["rows"], manifest["bad"])
    except (ValueError, KeyError, TypeError):
        wanted, counts = {}, Counts()
    names = {task.part(index) for index in range(task.total)}
    names |= {task.bad(index) for index in range(task.total)}
    names |= wanted.keys()
    wrong, missing = [], False
    for name in sorted(names):
        try:
            if sha256(task.store, name) != wanted.get(name):
                wrong.append(name)
        except FileNotFoundError:
            missing = missing or name in wanted
    if not wrong and not missing and len(wanted) >= task.total:
        return counts
    for name in (SUCCESS, *wrong):
        task.store.remove(name)
    return None
