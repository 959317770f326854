"""The local engine: shards run in this process, or in worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from manyheads.apps.engines.worker import Site, Worker, threads
from manyheads.apps.parts import Done, OnBatch, Task, run_shard
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.predictor import AnyPredictor

POLL_S = 0.2  # between two looks for a signal while workers are busy


def plan(workers: int | None, address: str | None, shards: int) -> tuple[int, int]:
    """Return how many workers a job gets, and how many threads each.

    Args:
        workers: As the user asked; None is for the engine to choose: this process.
        address: Of a cluster, which there is none of here.
        shards: Of the job.

    Raises:
        UsageError: An address was given.
    """
    if address is not None:
        raise UsageError("--address is the Ray cluster's: it goes with --engine ray")
    torch = sys.modules.get("torch")
    asked = os.environ.get("OMP_NUM_THREADS", "")
    known = int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1
    available = torch.get_num_threads() if torch is not None else known
    return workers or 0, max(1, available // max(1, workers or 0))


def run(
    shards: Sequence[tuple[int, object]],
    task: Task,
    predictor: AnyPredictor,
    *,
    workers: int,
    check: Callable[[], None],
    advance: OnBatch,
    site: Site,
) -> Iterator[Done]:
    """Run shards, and yield the counts and cost of each as it is done.

    Args:
        shards: The shards to do, with their numbers.
        task: What they share.
        predictor: The loaded model, for this process.
        workers: Worker processes; 0 runs the shards here.
        check: Raises where the job has to stop.
        advance: Told of records and bad records: of a batch here, of a shard with workers.
        site: Not used: workers here find what this process does.

    Raises:
        ManyheadsError: A shard failed, or a worker died; what is done stays done.
    """
    if workers:
        if not task.store.shared:
            raise UsageError(f"{task.store.name} is in this process's memory: workers cannot reach it")
        yield from _run_in_workers(shards, task, workers, check, advance)
        return

    def on_batch(records: int, bad: int) -> None:
        advance(records, bad)
        check()

    with threads(task.threads):
        for index, shard in shards:
            check()
            yield run_shard(predictor, task, index, shard, on_batch)


def _run_in_workers(
    shards: Sequence[tuple[int, object]],
    task: Task,
    workers: int,
    check: Callable[[], None],
    advance: OnBatch,
) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)  # without a lock: a killed worker could take that with it
    pool = ProcessPoolExecutor(workers, context, _start, (task, stop, time.time()))
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


class _Process:
    """A worker process: the model, loaded on the first shard, so that a failure reaches the job's message."""

    def __init__(self, task: Task, stop: Any, begun: float) -> None:
        self.worker, self.stop, self.begun = Worker(task), stop, begun

    def run(self, index: int, shard: object) -> Done:
        starting = 0.0
        if self.worker.predictor is None:
            self.worker.load()
            starting = time.time() - self.begun
        return self.worker.run(index, shard, self.on_batch, starting)

    def on_batch(self, records: int, bad: int) -> None:
        if self.stop.value:
            raise ManyheadsError("the job was stopped")


_process: _Process | None = None


def _start(task: Task, stop: Any, begun: float) -> None:
    """Make this process a worker: signals are the runner's affair, and it ends with the runner."""
    global _process  # noqa: PLW0603  # a pool hands its workers nothing else
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process = _Process(task, stop, begun)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _run(index: int, shard: object) -> Done:
    assert _process is not None
    return _process.run(index, shard)
