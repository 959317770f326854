"""The local engine: shards run in this process, or in worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from manyheads.apps.parts import Done, OnBatch, Task, run_shard
from manyheads.core.errors import ManyheadsError
from manyheads.core.predictor import AnyPredictor, configure

POLL_S = 0.2  # between two looks for a signal while workers are busy


def run(
    shards: Sequence[tuple[int, object]],
    task: Task,
    predictor: AnyPredictor,
    *,
    workers: int,
    check: Callable[[], None],
    advance: OnBatch,
) -> Iterator[Done]:
    """Run shards, and yield the counts and cost of each as it is done.

    Args:
        shards: The shards to do, with their numbers.
        task: What they share.
        predictor: The loaded model, for this process.
        workers: Worker processes; 0 runs the shards here.
        check: Raises where the job has to stop.
        advance: Told of records and bad records: of a batch here, of a shard with workers.

    Raises:
        ManyheadsError: A shard failed, or a worker died; what is done stays done.
    """
    if workers:
        yield from _run_in_workers(shards, task, workers, check, advance)
        return

    def on_batch(records: int, bad: int) -> None:
        advance(records, bad)
        check()

    with _threads(task.threads):
        for index, shard in shards:
            check()
            yield run_shard(predictor, task, index, shard, on_batch)


def available_threads() -> int:
    """Return how many threads torch uses here; the processors of this process where it is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch's threads, if the predictor brought torch in."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_in_workers(
    shards: Sequence[tuple[int, object]],
    task: Task,
    workers: int,
    check: Callable[[], None],
    advance: OnBatch,
) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)  # without a lock: a killed worker could take that with it
    pool = ProcessPoolExecutor(workers, context, _start, (task, stop))
    waiting, running = iter(shards), set[Future[Done]]()
    try:
        while True:
            check()
            for index, shard in islice(waiting, 2 * workers - len(running)):
                running.add(pool.submit(_run, index, shard))
            if not running:
                return
            done, running = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                advance(result.counts.records, result.counts.bad)
                yield result
    except BrokenProcessPool as error:
        raise ManyheadsError(
            "a worker process died (killed, or out of memory?); what is done stays: go on with --resume"
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


class _Worker:
    """A worker process: the model, loaded on the first shard, so that a failure reaches the job's message."""

    def __init__(self, task: Task, stop: Any) -> None:
        self.task = task
        self.stop = stop
        self.predictor: AnyPredictor | None = None

    def run(self, index: int, shard: object) -> Done:
        if self.predictor is None:
            loaded, identity = self.task.load(self.task.model)
            self.predictor = configure(loaded, self.task.settings)
            if identity != self.task.identity:
                raise ManyheadsError(f"the model {self.task.model} was replaced while the job ran")
        with _threads(self.task.threads):
            return run_shard(self.predictor, self.task, index, shard, self.on_batch)

    def on_batch(self, records: int, bad: int) -> None:
        if self.stop.value:
            raise ManyheadsError("the job was stopped")


_worker: _Worker | None = None


def _start(task: Task, stop: Any) -> None:
    """Make this process a worker: signals are the runner's affair, and it ends with the runner."""
    global _worker  # noqa: PLW0603  # a pool hands its workers nothing else
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(task, stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _run(index: int, shard: object) -> Done:
    assert _worker is not None
    return _worker.run(index, shard)
