"""What a predictor makes of all parts together, in `results`: a file a speaker, subtitles a recording.

In a local folder `results` is filled under a temporary name and renamed, so it is whole or not there; a job
killed meanwhile makes it again from the parts.

Where the output lies elsewhere, the files of rows come to this machine shard by shard, and leave again when
they are of no more use; so do the files of `results`, once they are stored. A predictor looks at a file no
more after it has read rows of two further ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from manyheads.apps.parts import FULL, Task
from manyheads.apps.stores import LocalStore, sha256
from manyheads.core import files
from manyheads.core.errors import ManyheadsError
from manyheads.core.predictor import AnyPredictor, Row

RESULTS = "results"
FETCHED = "fetched"  # of the spool folder: the files of rows
BATCH = 1024  # rows read at a time


def finish(task: Task, predictor: AnyPredictor, check: Callable[[], None]) -> dict[str, str]:
    """Let a predictor make its results, if it has any to make.

    Args:
        task: A job whose parts all stand.
        predictor: The model's steps.
        check: Called at each part; what it raises ends the step.

    Returns:
        The files that belong to the job's result beside parts and bad records, with their hashes.

    Raises:
        ManyheadsError: The step failed; the parts stay.
    """
    kept = [] if _temporary(predictor) else [task.files(index) for index in range(task.total)]
    found = {name: sha256(task.store, name) for folder in kept for name in task.store.below(folder)}
    if not hasattr(predictor, "finish"):
        return found
    written = task.store.scratch(RESULTS)
    written.mkdir()
    local = isinstance(task.store, LocalStore)
    flow: _Here | _Elsewhere = _Here(task) if local else _Elsewhere(task, written)
    try:
        predictor.finish(flow.rows(check), flow.parts, written)
        task.reach("finished", task.total)
        flow.end(written)
    except ManyheadsError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ManyheadsError(f"the results: {error}") from error
    except Exception as error:
        raise ManyheadsError(f"the results: {type(error).__name__}: {error}") from error
    task.reach("results", task.total)
    return found | {name: sha256(task.store, name) for name in task.store.below(RESULTS)}


def clean(task: Task, predictor: AnyPredictor) -> None:
    """Remove the files of rows that are of no use any more; the job is done."""
    if _temporary(predictor):
        there = task.store.names()
        for index in range(task.total):
            if task.files(index) in there:
                task.store.remove(task.files(index))
            task.reach("cleaned", index)


def _temporary(predictor: AnyPredictor) -> bool:
    return bool(getattr(predictor, "temporary_files", False))


class _Here:
    """The output is a local folder: nothing needs to move.

    Args:
        task: The job.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.parts = task.store.root if isinstance(task.store, LocalStore) else Path()

    def rows(self, check: Callable[[], None]) -> Iterator[Row]:
        """Yield the rows of all parts in order."""
        for index in range(self.task.total):
            self.task.reach("finishing", index)
            yield from _rows(self.task, index, check)

    def end(self, written: Path) -> None:
        """Give the results their name."""
        self.task.store.remove(RESULTS)
        if any(written.iterdir()):
            self.task.store.commit(written, RESULTS)
        else:
            files.remove(written)


class _Elsewhere:
    """The output lies elsewhere: files come, and go when rows of two further ids have been read.

    Args:
        task: The job.
        written: Where the predictor writes its results.
    """

    def __init__(self, task: Task, written: Path) -> None:
        self.task, self.written = task, written
        self.parts = task.store.spool / FETCHED
        self._changes = 0  # of the id, from a row to the next
        self._fetched: list[tuple[int, str]] = []  # the changes at a folder's last row, and the folder
        self._made: list[tuple[int, set[Path]]] = []  # the changes at a look, and the results that were there
        files.remove(self.parts)
        task.store.remove(RESULTS)

    def rows(self, check: Callable[[], None]) -> Iterator[Row]:
        """Yield the rows of all parts in order, with their files at hand."""
        last: object = None
        for index in range(self.task.total):
            self.task.reach("finishing", index)
            folder = self.task.files(index)
            self.task.store.fetch(folder, self.parts)
            for row in _rows(self.task, index, check):
                if row.get("id") != last:
                    last = row.get("id")
                    self._changes += 1
                    self._made.append((self._changes, self._results()))
                    self._move()
                yield row
            self._fetched.append((self._changes, folder))

    def end(self, written: Path) -> None:
        """Store what is left."""
        self._store(self._results())
        files.remove(written)
        files.remove(self.parts)

    def _results(self) -> set[Path]:
        return {path for path in self.written.rglob("*") if path.is_file()}

    def _move(self) -> None:
        """Let go what was there two ids ago."""
        while self._fetched and self._fetched[0][0] <= self._changes - 2:
            files.remove(self.parts / self._fetched.pop(0)[1])
        while self._made and self._made[0][0] <= self._changes - 2:
            self._store(self._made.pop(0)[1])

    def _store(self, paths: set[Path]) -> None:
        for path in sorted(paths):
            if path.exists():
                name = path.relative_to(self.written).as_posix()
                self.task.store.commit(path, f"{RESULTS}/{name}")


def _rows(task: Task, index: int, check: Callable[[], None]) -> Iterator[Row]:
    """Yield the rows of a part."""
    import pyarrow.parquet as pq

    with task.store.open(task.part(index)) as content:
        for batch in pq.ParquetFile(content).iter_batches(BATCH):
            check()
            yield from batch.to_pylist()
