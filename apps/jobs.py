"""Batch jobs: a model over files, killed at any point and resumed to the same bytes.

The output folder holds `job.json` (what the bytes depend on, and its hash, the fingerprint), one
`part-00003-of-00079.parquet` a shard, `bad-00003.jsonl` for a shard with bad records, and at the end
`_SUCCESS` with the totals and the hash of every file. Parts and bad files appear whole under their names or
not at all. Where rows carry files these are in a folder `files-00003` a shard, and where the domain makes
something of all parts together that is in `results`.
"""

from __future__ import annotations

import errno
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manyheads.apps import finishing, jobfolder
from manyheads.apps.parts import FULL, Cost, Counts, Fault, Load, Task, read_counts
from manyheads.apps.progress import Count, Progress
from manyheads.apps.stopping import Stopped, Stopping
from manyheads.core import hub
from manyheads.core.errors import DataError, ManyheadsError, UsageError, did_you_mean
from manyheads.core.predictor import AnyPredictor, Settings, configure, settings_of

ENGINES = {"local": "manyheads.apps.engines.local"}
TOO_MANY_BAD = 3
SHARD_SIZE = 64  # records a part file, where the domain has no number of its own
MANY_FILES = 2000  # of an input; reading them takes long enough to say so


@dataclass(frozen=True)
class JobOptions:
    """What to run.

    Args:
        model: A model folder.
        inputs: Files, folders or patterns.
        output: The job's folder.
        engine: Where shards run.
        batch_size: Records a batch; the domain's own number by default.
        workers: Worker processes; 0 runs in this one.
        shard_size: Records a part file, about; the domain's own number by default, or 64.
        resume: Go on with the job in the folder; a folder without one starts it.
        max_bad: Share of bad records, 0 to 1, up to which the job counts as done.
        quiet: Print errors only.
        settings: What the domain's predictor knows, by name (`output_kind`, `top_k` of images).
    """

    model: str
    inputs: list[str]
    output: Path
    engine: str = "local"
    batch_size: int | None = None
    workers: int = 0
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
        if self.workers < 0:
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
        preparing: Share of this run's CPU time, 0 to 1, that went into reading and preparing records; None
            where it predicted nothing.
    """

    rows: int
    bad: int
    records: int
    shards: int
    seconds: float
    exit_code: int
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
    start = time.perf_counter()
    options.check()
    inputs = jobfolder.resolve_inputs(options.inputs, options.output)
    with _created(options.output), jobfolder.locked(options.output), Stopping() as stopping:
        jobfolder.check_free(options.output, options.resume)
        predictor, identity = load(options.model)
        predictor = configure(predictor, options.settings)
        if options.shard_size is None:
            options = replace(options, shard_size=getattr(predictor, "shard_size", SHARD_SIZE))
        with _resumable(options.output):
            seen = _stamp(predictor, inputs)
            shards = _shards(predictor, inputs, options)
            described = _describe(predictor, inputs, options, stopping.check)
            task = _open(options, described, identity, predictor, len(shards), load, fault)
            counts, before, cost = jobfolder.finished(task), None, Cost()
            if counts is None:
                counts, before, cost = _run(options, task, predictor, shards, stopping)
                if _stamp(predictor, inputs) != seen:
                    raise DataError("an input changed while the job ran: start again in another folder")
                if counts.bad <= options.max_bad * counts.records:
                    jobfolder.finish(task, counts, finishing.finish(task, predictor, stopping.check))
            if (options.output / jobfolder.SUCCESS).exists():
                finishing.clean(task, predictor)
    seconds = time.perf_counter() - start
    code = 0 if (options.output / jobfolder.SUCCESS).exists() else TOO_MANY_BAD
    preparing = cost.preparing / cost.total if cost.total else None
    result = JobResult(counts.rows, counts.bad, counts.records, task.total, seconds, code, preparing)
    _report(options, result, before)
    return result


@contextmanager
def _created(output: Path) -> Iterator[None]:
    """Make the folder, and remove it again if the job never came to write into it."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: choose a folder for the output")
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ManyheadsError(f"cannot make the folder {output}: {error.strerror}") from error
    try:
        yield
    finally:
        if made and not (output / jobfolder.JOB).exists():
            with suppress(OSError):  # it has other files
                output.rmdir()


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Remove temporary files however the run ends, and say that it can go on."""
    jobfolder.clear_temporaries(output)
    try:
        yield
    except Stopped as error:
        error.args = (f"{error}; what is done stays in {output}: go on with --resume",)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = "file too large" if error.errno == errno.EFBIG else "no space left"
        raise ManyheadsError(
            f"cannot write to {output} ({reason}): make room and go on with --resume"
        ) from error
    finally:
        jobfolder.clear_temporaries(output)


def _source(inputs: list[Path]) -> str | list[str]:
    names = [str(path) for path in inputs]
    return names[0] if len(names) == 1 else names


def _shards(predictor: AnyPredictor, inputs: list[Path], options: JobOptions) -> list[Any]:
    assert options.shard_size is not None
    shards = predictor.shards(_source(inputs), options.shard_size)
    if not shards:
        raise DataError(f"no records in {', '.join(map(str, inputs))}")
    return shards


def _named_files(predictor: AnyPredictor, inputs: list[Path]) -> Iterator[str]:
    """Yield the files that the inputs name without containing them."""
    if hasattr(predictor, "named_files"):
        yield from predictor.named_files(_source(inputs))


def _stamp(predictor: AnyPredictor, inputs: list[Path]) -> str:
    return jobfolder.stamp(inputs, _named_files(predictor, inputs))


def _describe(
    predictor: AnyPredictor, inputs: list[Path], options: JobOptions, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Read the inputs for the fingerprint, with a bar where they are many files."""
    total = sum(len(jobfolder.contents(path)) for path in inputs)
    total += sum(1 for _ in _named_files(predictor, inputs))
    with Count(total, "input files", options.quiet or total < MANY_FILES) as count:

        def advance(number: int) -> None:
            count.advance(number)
            check()

        found = [jobfolder.describe_input(path, advance) for path in inputs]
        named = jobfolder.describe_named(_named_files(predictor, inputs), advance)
        return [*found, named] if named["files"] else found


def _open(
    options: JobOptions,
    described: list[dict[str, Any]],
    identity: dict[str, str],
    predictor: AnyPredictor,
    total: int,
    load: Load,
    fault: Fault | None,
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
    job["threads"] = max(1, engine.available_threads() // max(1, options.workers))
    if (options.output / jobfolder.JOB).exists():
        before = jobfolder.read_job(options.output)
        jobfolder.check_same(options.output, before, job)
        job = before
    else:
        jobfolder.write_job(options.output, job)
    return Task(
        model=options.model,
        identity=identity,
        load=load,
        output=options.output,
        total=total,
        batch_size=batch_size,
        threads=job["threads"],
        fingerprint=job["fingerprint"],
        settings=settings_of(predictor),
        fault=fault,
    )


def _run(
    options: JobOptions, task: Task, predictor: AnyPredictor, shards: list[Any], stopping: Stopping
) -> tuple[Counts, Counts, Cost]:
    """Run the shards that have no valid part yet.

    Returns:
        The job's counts, those of earlier runs among them, and what this run cost.
    """
    engine = importlib.import_module(ENGINES[options.engine])
    found = [read_counts(task, index) for index in range(task.total)]
    todo = [(index, shards[index]) for index, counts in enumerate(found) if counts is None]
    before = total = sum((counts for counts in found if counts is not None), Counts())
    cost, size = Cost(), _records(predictor, [shard for _, shard in todo], options.shard_size or SHARD_SIZE)
    with Progress(task.total, task.total - len(todo), size, options.quiet) as progress:
        for done in engine.run(
            todo, task, predictor, workers=options.workers, check=stopping.check, advance=progress.advance
        ):
            progress.finish_shard()
            total += done.counts
            cost += done.cost
    return total, before, cost


def _records(predictor: AnyPredictor, shards: list[Any], size: int) -> int:
    """Return the records of a shard, about."""
    if not shards or not hasattr(predictor, "count"):
        return size
    return max(1, round(sum(map(predictor.count, shards)) / len(shards)))


def _report(options: JobOptions, result: JobResult, before: Counts | None) -> None:
    """Say how the job ended, on the standard error; `before` is None where it had ended before."""
    if not options.quiet:
        run = "was done, verified"
        if before is not None:
            made = result.records - before.records
            run = f"{made} records in {result.seconds:.1f} s, {made / result.seconds:.1f} records/s"
            if result.preparing is not None:
                run += f", reading and preparing {result.preparing:.0%} of CPU"
        totals = f"{result.records} records, {result.rows} rows, {result.bad} bad"
        results = options.output / finishing.RESULTS
        also = f", made of them: {results}" if results.exists() else ""
        print(f"{totals} -> {options.output}{also} ({run})", file=sys.stderr)
    if result.exit_code == TOO_MANY_BAD:
        share = result.bad / max(1, result.records)
        print(
            f"{result.bad} of {result.records} records are bad ({share:.3g}), more than --max-bad"
            f" {options.max_bad:g}: the reasons are in {options.output}/bad-*.jsonl;"
            f" --resume --max-bad {share + 0.0005:.3f} accepts them",
            file=sys.stderr,
        )
