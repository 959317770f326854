"""`manyheads jobs status DIR`: how far a batch job is, and what to do next. Needs no torch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from manyheads.apps import jobfolder
from manyheads.apps.arguments import make_parser
from manyheads.apps.locks import holder
from manyheads.apps.parts import FOOTER
from manyheads.apps.progress import clock
from manyheads.apps.stores import Store, open_store
from manyheads.core.errors import UsageError

AT_ONCE = 16  # footers read


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Args:
        output: The job's folder.
        model: Its model's name.
        state: `finished`, `running`, `too many bad` or `stopped`.
        shards, done, left: How many there are, and of these with a part and without.
        damaged: Parts that cannot be read, or are another job's: they will be made again.
        records, rows, bad: Of the parts.
        runner: Who is at work.
        rate: Records a second of the run at work; None where there is none, or nothing to tell it by.
        seconds_left: At that rate.
        advice: What to do next.
    """

    output: str
    model: str
    state: str
    shards: int
    done: int
    left: int
    damaged: int
    records: int
    rows: int
    bad: int
    runner: str | None
    rate: float | None
    seconds_left: float | None
    advice: str


def main(args: Sequence[str]) -> int:
    """Tell how far a job is."""
    parser = make_parser(
        "jobs",
        "Tell how far a batch job is: its shards, rows and bad records, whether a runner is at work,\n"
        "and what to do next. Parts are taken at their word; --resume verifies them.",
        epilog="example: manyheads jobs status forecasts",
    )
    parser.add_argument("action", choices=("status",))
    parser.add_argument("output", metavar="DIR", help="a job's output folder or address")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse(args)
    status = read_status(open_store(parsed.output))
    print(json.dumps(asdict(status)) if parsed.json else text(status))
    return 0


def read_status(store: Store) -> Status:
    """Return how far the job in a folder is.

    Raises:
        UsageError: The folder holds no job.
        ManyheadsError: What it holds is damaged.
    """
    try:
        names = store.names()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no folder {store.name}") from error
    if jobfolder.JOB not in names:
        raise UsageError(
            f"{store.name} holds no job: `manyheads predict MODEL INPUT -o {store.name}` starts one"
        )
    job = jobfolder.read_job(store)
    lock = store.at_work()
    found = _parts(store, names, job["fingerprint"])
    done = [footer for footer in found.values() if footer is not None]
    totals = {key: sum(int(footer[key]) for footer in done) for key in ("records", "rows", "bad")}
    finished = jobfolder.SUCCESS in names
    left = int(job["shards"]) - len(done)
    over = not left and totals["bad"]
    state = "finished" if finished else "running" if lock else "too many bad" if over else "stopped"
    rate = _rate(lock, {name: names[name] for name, footer in found.items() if footer}, found)
    mean = totals["records"] / len(done) if done else 0.0
    return Status(
        output=store.name,
        model=str(job.get("model", {}).get("name", "?")),
        state=state,
        shards=int(job["shards"]),
        done=len(done),
        left=left,
        damaged=len(found) - len(done),
        runner=holder(lock) if lock else None,
        rate=rate,
        seconds_left=left * mean / rate if rate else None,
        advice=_advice(state, store.name, totals),
        **totals,
    )


def _parts(store: Store, names: dict[str, float], fingerprint: str) -> dict[str, dict[str, Any] | None]:
    """Return the footers of the parts that are there; None for one that cannot be used."""
    parts = sorted(name for name in names if re.fullmatch(r"part-\d+-of-\d+\.parquet", name))

    def read(name: str) -> dict[str, Any] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with store.open(name) as content:
                footer = json.loads(pq.read_metadata(content).metadata[FOOTER.encode()])
            return footer if footer["fingerprint"] == fingerprint else None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(parts, pool.map(read, parts), strict=True))


def _rate(
    lock: str | None, written: dict[str, float], footers: dict[str, dict[str, Any] | None]
) -> float | None:
    """Return the records a second since the runner at work began."""
    since = re.search(r"^since (\d+)$", lock or "", re.MULTILINE)
    if since is None:
        return None
    begun = float(since[1])
    made = sum(int((footers[name] or {}).get("records", 0)) for name, at in written.items() if at >= begun)
    return made / max(time.time() - begun, 1.0) if made else None


def _advice(state: str, name: str, totals: dict[str, int]) -> str:
    """Return what to do next."""
    if state == "finished":
        return f"nothing: the rows are in {name}/part-*.parquet"
    if state == "running":
        return "wait, or stop it (SIGTERM): the same command with --resume goes on"
    if state == "too many bad":
        share = totals["bad"] / max(1, totals["records"]) + 0.0005
        return (
            f"look into {name}/bad-*.jsonl; the same command with --resume --max-bad {share:.3f} accepts them"
        )
    return "the same command with --resume goes on"


def text(status: Status) -> str:
    """Return a status for people."""
    damaged = f", {status.damaged} damaged (to be made again)" if status.damaged else ""
    lines = [
        f"{status.output}: {status.state} (model {status.model})",
        f"shards   {status.done} of {status.shards} done, {status.left} left{damaged}",
        f"records  {status.records}, {status.rows} rows, {status.bad} bad",
    ]
    if status.runner is not None:
        at = f", {status.rate:.1f} records/s, {clock(status.seconds_left or 0)} left" if status.rate else ""
        lines.append(f"runner   {status.runner}{at}")
    return "\n".join([*lines, f"next     {status.advice}"])
