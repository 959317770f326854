"""What a predictor makes of all parts together, in `results`: a file a speaker, subtitles a recording.

The folder is filled under a temporary name and renamed, so it is whole or not there; a job killed meanwhile
makes it again from the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from manyheads.apps.parts import FULL, Task
from manyheads.core import files
from manyheads.core.errors import ManyheadsError
from manyheads.core.predictor import AnyPredictor, Row

RESULTS = "results"
BATCH = 1024  # rows read at a time


def finish(task: Task, predictor: AnyPredictor, check: Callable[[], None]) -> list[Path]:
    """Let a predictor make its results, if it has any to make.

    Args:
        task: A job whose parts all stand.
        predictor: The model's steps.
        check: Called at each part; what it raises ends the step.

    Returns:
        The files that belong to the job's result beside parts and bad records.

    Raises:
        ManyheadsError: The step failed; the parts stay.
    """
    found = [] if _temporary(predictor) else _below(*(task.files(index) for index in range(task.total)))
    if not hasattr(predictor, "finish"):
        return found
    folder = task.output / RESULTS
    written = files.temporary(folder)
    written.mkdir()
    try:
        predictor.finish(_rows(task, check), task.output, written)
    except ManyheadsError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ManyheadsError(f"the results: {error}") from error
    except Exception as error:
        raise ManyheadsError(f"the results: {type(error).__name__}: {error}") from error
    task.reach("finished", task.total)
    files.remove(folder)
    if any(written.iterdir()):
        files.replace_folder(written, folder)
    else:
        files.remove(written)
    task.reach("results", task.total)
    return found + _below(folder)


def clean(task: Task, predictor: AnyPredictor) -> None:
    """Remove the files of rows that are of no use any more; the job is done."""
    if _temporary(predictor):
        for index in range(task.total):
            files.remove(task.files(index))
            task.reach("cleaned", index)


def _temporary(predictor: AnyPredictor) -> bool:
    return bool(getattr(predictor, "temporary_files", False))


def _rows(task: Task, check: Callable[[], None]) -> Iterator[Row]:
    """Yield the rows of all parts in order."""
    import pyarrow.parquet as pq

    for index in range(task.total):
        task.reach("finishing", index)
        with pq.ParquetFile(str(task.part(index))) as part:
            for batch in part.iter_batches(BATCH):
                check()
                yield from batch.to_pylist()


def _below(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
