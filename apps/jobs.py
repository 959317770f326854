"""Batch jobs: a model over files, killed at any point and resumed to the same bytes.

The output folder holds `job.json` (what the bytes depend on, and its hash, the fingerprint), one
`part-00003-of-00079.parquet` a shard, `bad-00003.jsonl` for a shard with bad records, and at the end
`_SUCCESS` with the totals and the hash of every file. Parts and bad files appear whole under their names or
not at all (`stores` says how, on which file systems). Where rows carry files these are in a folder
`files-00003` a shard, and where the domain makes something of all parts together that is in `results`.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manyheads.apps import finishing, jobfolder
from manyheads.apps import inputs as given
from manyheads.apps.engines.worker import Site
from manyheads.apps.parts import FULL, Cost, Counts, Fault, Load, Task, read_counts
from manyheads.apps.progress import Count, Progress
from manyheads.apps.stopping import Stopped, Stopping
from manyheads.apps.stores import Store, open_store
from manyheads.core import files, hub
from manyheads.core.errors import DataError, ManyheadsError, UsageError, did_you_mean
from manyheads.core.predictor import AnyPredictor, Settings, configure, settings_of

ENGINES = {"local": "manyheads.apps.engines.local", "ray": "manyheads.apps.engines.ray"}
TOO_MANY_BAD = 3
SHARD_SIZE = 64  # records a part file, where the domain has no number of its own
MANY_FILES = 2000  # of an input; reading them takes long enough to say so


@dataclass(frozen=True)
class JobOptions:
    """What to run.

    Args:
        model: A model folder, a run folder, `org/name[@revision]`, or a catalogue name with known weights.
        inputs: Files, folders, patterns, or addresses of a file system that fsspec knows.
        output: The job's folder, or its address.
        engine: Where shards run.
        address: Of the Ray cluster.
        batch_size: Records a batch; the domain's own number by default.
        workers: Worker processes; 0 runs in this one. By default the engine chooses.
        shard_size: Records a part file, about; the domain's own number by default, or 64.
        resume: Go on with the job in the folder; a folder without one starts it.
        max_bad: Share of bad records, 0 to 1, up to which the job counts as done.
        quiet: Print errors only.
        settings: What the domain's predictor knows, by name (`output_kind`, `top_k` of images).
    """

    model: str
    inputs: list[str]
    output: Path | str
    engine: str = "local"
    address: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    shard_size: int | None = None
    resume: bool = False
    max_bad: float = 0.0
    quiet: bool = False
    settings: Settings = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: One is out of range.
        """
        if self.engine not in ENGINES:
            known = did_you_mean(self.engine, ENGINES)
            raise UsageError(f"no engine {self.engine!r}{known} (engines: {', '.join(ENGINES)})")
        if not self.inputs:
            raise UsageError("a job needs an input")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {self.batch_size}")
        if self.shard_size is not None and self.shard_size < 1:
            raise UsageError(f"the shard size must be at least 1, not {self.shard_size}")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"the number of workers must be at least 0, not {self.workers}")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"the share of bad records must lie between 0 and 1, not {self.max_bad}")


@dataclass(frozen=True)
class JobResult:
    """What a job came to, earlier runs included.

    Args:
        rows: Rows of all parts.
        bad: Records that could not be used.
        records: All records.
        shards: Parts.
        seconds: Of this run.
        exit_code: 0, or 3 where more records are bad than allowed.
        starting: Of this run's seconds, those until a worker could begin: loading the model, starting them.
        preparing: Share of this run's CPU time, 0 to 1, that went into reading and preparing records; None
            where it predicted nothing.
    """

    rows: int
    bad: int
    records: int
    shards: int
    seconds: float
    exit_code: int
    starting: float = field(default=0.0, compare=False)
    preparing: float | None = field(default=None, compare=False)


def load_model(reference: str) -> tuple[AnyPredictor, dict[str, str]]:
    """Load a model folder's predictor, and say what it is."""
    model, config = hub.load_model(hub.find_folder(reference))
    return hub.make_predictor(model, config), {"name": config.name, "sha256": config.identity}


def run_job(options: JobOptions, *, load: Load = load_model, fault: Fault | None = None) -> JobResult:
    """Run or resume a job.

    Args:
        options: What to run.
        load: Returns the predictor of a model's reference, and what identifies it.
        fault: Called at the steps of the protocol, for tests.

    Returns:
        The totals; exit code 3, and no `_SUCCESS`, where more records are bad than allowed.

    Raises:
        UsageError: An option, input or folder is wrong, or the folder holds another job.
        ManyheadsError: A failure; what is done stays, and `resume` goes on from there.
    """
    options.check()
    start, store, run = time.perf_counter(), open_store(options.output), secrets.token_hex(8)
    with store.opened(), store.locked(run) as lock, Stopping() as stopping:

        def check() -> None:
            stopping.check()
            lock.check()

        jobfolder.check_free(store, options.resume)
        with _resumable(store):
            task, counts, before, spent = _work(options, store, run, load, fault, check)
        done = store.exists(jobfolder.SUCCESS)
        if done:
            files.remove(store.spool)
    cost = spent.total
    result = JobResult(
        counts.rows,
        counts.bad,
        counts.records,
        task.total,
        time.perf_counter() - start,
        0 if done else TOO_MANY_BAD,
        spent.starting,
        cost.preparing / cost.total if cost.total else None,
    )
    _report(options, store, result, before)
    return result


def _work(
    options: JobOptions, store: Store, run: str, load: Load, fault: Fault | None, check: Callable[[], None]
) -> tuple[Task, Counts, Counts | None, _Spending]:
    """Load the model, read the inputs, and do what is left of the job.

    Returns:
        The job, its counts, those of earlier runs (None where it was done before), and what this run cost.
    """
    inputs = given.resolve(options.inputs, store, options.quiet)
    begin = time.perf_counter()
    predictor, identity = load(options.model)
    predictor = configure(predictor, options.settings)
    spent = _Spending(starting=time.perf_counter() - begin)
    if options.shard_size is None:
        options = replace(options, shard_size=getattr(predictor, "shard_size", SHARD_SIZE))
    _fetch_named(predictor, inputs, options, store)
    seen = _stamp(predictor, inputs)
    shards = _shards(predictor, inputs, options)
    described = _describe(predictor, inputs, options, check)
    task = _open(options, described, identity, predictor, len(shards), load, fault, store, run)
    counts, before = jobfolder.finished(task), None
    if counts is None:
        counts, before = _run(options, task, predictor, shards, inputs, check, spent)
        if _stamp(predictor, inputs) != seen:
            raise DataError("an input changed while the job ran: start again in another folder")
        if counts.bad <= options.max_bad * counts.records:
            jobfolder.finish(task, counts, finishing.finish(task, predictor, check))
    if store.exists(jobfolder.SUCCESS):
        finishing.clean(task, predictor)
    return task, counts, before, spent


@dataclass
class _Spending:
    """What a run cost so far."""

    starting: float
    total: Cost = field(default_factory=Cost)


@contextmanager
def _resumable(store: Store) -> Iterator[None]:
    """Remove temporary files however the run ends, and say that it can go on."""
    store.clear()
    try:
        yield
    except Stopped as error:
        error.args = (f"{error}; what is done stays in {store.name}: go on with --resume",)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = "file too large" if error.errno == errno.EFBIG else "no space left"
        place = store.name if error.filename is None else str(Path(error.filename).parent)
        raise ManyheadsError(
            f"cannot write to {place} ({reason}): make room and go on with --resume"
        ) from error
    finally:
        store.clear()


def _source(inputs: list[Path]) -> str | list[str]:
    names = [str(path) for path in inputs]
    return names[0] if len(names) == 1 else names


def _shards(predictor: AnyPredictor, inputs: list[Path], options: JobOptions) -> list[Any]:
    assert options.shard_size is not None
    shards = predictor.shards(_source(inputs), options.shard_size)
    if not shards:
        raise DataError(f"no records in {', '.join(map(str, inputs))}")
    return shards


def _fetch_named(predictor: AnyPredictor, inputs: list[Path], options: JobOptions, store: Store) -> None:
    """Copy what tables name that were copied themselves."""
    staged = given.staging_of(options.inputs, store)
    if staged is not None:
        staged.fetch_named(_named_files(predictor, inputs))


def _named_files(predictor: AnyPredictor, inputs: list[Path]) -> Iterator[str]:
    """Yield the files that the inputs name without containing them."""
    if hasattr(predictor, "named_files"):
        yield from predictor.named_files(_source(inputs))


def _stamp(predictor: AnyPredictor, inputs: list[Path]) -> str:
    return given.stamp(inputs, _named_files(predictor, inputs))


def _describe(
    predictor: AnyPredictor, inputs: list[Path], options: JobOptions, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Read the inputs for the fingerprint, with a bar where they are many files."""
    total = sum(len(given.contents(path)) for path in inputs)
    total += sum(1 for _ in _named_files(predictor, inputs))
    with Count(total, "input files", options.quiet or total < MANY_FILES) as count:

        def advance(number: int) -> None:
            count.advance(number)
            check()

        found = [given.describe_input(path, advance) for path in inputs]
        named = given.describe_named(_named_files(predictor, inputs), advance)
        return [*found, named] if named["files"] else found


def _open(
    options: JobOptions,
    described: list[dict[str, Any]],
    identity: dict[str, str],
    predictor: AnyPredictor,
    total: int,
    load: Load,
    fault: Fault | None,
    store: Store,
    run: str,
) -> Task:
    """Write `job.json`, or compare with the one that is there."""
    engine = importlib.import_module(ENGINES[options.engine])
    batch_size = options.batch_size or predictor.batch_size
    job = jobfolder.describe_job(
        identity,
        {"batch_size": batch_size, "shard_size": options.shard_size or 0, **settings_of(predictor)},
        described,
        total,
    )
    _, job["threads"] = engine.plan(options.workers, options.address, total)
    if store.exists(jobfolder.JOB):
        before = jobfolder.read_job(store)
        jobfolder.check_same(store, before, job)
        job = before
    else:
        jobfolder.write_job(store, job)
    staged = given.staging_of(options.inputs, store)
    return Task(
        model=options.model,
        identity=identity,
        load=load,
        store=store,
        run=run,
        total=total,
        batch_size=batch_size,
        threads=job["threads"],
        fingerprint=job["fingerprint"],
        settings=settings_of(predictor),
        renamed=() if staged is None else staged.renamed,
        fault=fault,
    )


def _run(
    options: JobOptions,
    task: Task,
    predictor: AnyPredictor,
    shards: list[Any],
    inputs: list[Path],
    check: Callable[[], None],
    spent: _Spending,
) -> tuple[Counts, Counts]:
    """Run the shards that have no valid part yet.

    Returns:
        The job's counts, those of earlier runs among them, and those of earlier runs.
    """
    engine = importlib.import_module(ENGINES[options.engine])
    workers, _ = engine.plan(options.workers, options.address, task.total)
    found = [read_counts(task, index) for index in range(task.total)]
    todo = [(index, shards[index]) for index, counts in enumerate(found) if counts is None]
    before = total = sum((counts for counts in found if counts is not None), Counts())
    size = _records(predictor, [shard for _, shard in todo], options.shard_size or SHARD_SIZE)
    site = _site(options, task, predictor, inputs)
    begun, ready = spent.starting, math.inf
    with Progress(task.total, task.total - len(todo), size, options.quiet) as progress:
        for done in engine.run(
            todo, task, predictor, workers=workers, check=check, advance=progress.advance, site=site
        ):
            progress.finish_shard()
            total += done.counts
            spent.total += done.cost
            if done.starting:
                ready = min(ready, done.starting)
                spent.starting = begun + ready
    return total, before


def _site(options: JobOptions, task: Task, predictor: AnyPredictor, inputs: list[Path]) -> Site:
    """Describe what a worker must find where it runs."""
    return Site(
        options.address,
        os.getcwd(),
        _source(inputs),
        given.staging_of(options.inputs, task.store),
        given.sample(inputs, _named_files(predictor, inputs)),
        jobfolder.software(),
        options.quiet,
    )


def _records(predictor: AnyPredictor, shards: list[Any], size: int) -> int:
    """Return the records of a shard, about."""
    if not shards or not hasattr(predictor, "count"):
        return size
    return max(1, round(sum(map(predictor.count, shards)) / len(shards)))


def _report(options: JobOptions, store: Store, result: JobResult, before: Counts | None) -> None:
    """Say how the job ended, on the standard error; `before` is None where it had ended before."""
    if not options.quiet:
        run = "was done, verified"
        if before is not None:
            made = result.records - before.records
            run = f"{made} records in {result.seconds:.1f} s, {made / result.seconds:.1f} records/s"
            run += f", start-up {result.starting:.1f} s"
            if result.preparing is not None:
                run += f", reading and preparing {result.preparing:.0%} of CPU"
        totals = f"{result.records} records, {result.rows} rows, {result.bad} bad"
        results = store.exists(finishing.RESULTS)
        also = f", made of them: {store.name}/{finishing.RESULTS}" if results else ""
        print(f"{totals} -> {store.name}{also} ({run})", file=sys.stderr)
    if result.exit_code == TOO_MANY_BAD:
        share = result.bad / max(1, result.records)
        print(
            f"{result.bad} of {result.records} records are bad ({share:.3g}), more than --max-bad"
            f" {options.max_bad:g}: the reasons are in {store.name}/bad-*.jsonl;"
            f" --resume --max-bad {share + 0.0005:.3f} accepts them",
            file=sys.stderr,
        )
