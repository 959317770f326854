"""The Ray engine: shards run in actors on a cluster; each holds the model, and they take shards in turn.

The job's folder and protocol are the local engine's: an actor runs the same function over a shard and stores
the part itself. A shard whose actor died (killed, out of memory, its node gone) is given to another, in all
`TRIES` times; what an actor was cut off from storing is made again with the same bytes under the same name.

Nodes must see the output folder, the model and the inputs under the same names. An actor looks for the run's
number in the folder's lock, and for some files of the inputs, before it takes work.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from typing import Any

from manyheads.apps import locks
from manyheads.apps.engines.worker import Site, Worker
from manyheads.apps.parts import Done, OnBatch, Task
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.predictor import AnyPredictor

POLL_S = 0.2  # between two looks for a signal
REACH_S = 5.0  # for a cluster's head to answer
START_S = 120.0  # for a first worker, while there is none
TRIES = 3  # of a shard whose worker dies, and of a worker that dies before it has begun
STORE_BYTES = 200 << 20  # of shared memory, where the cluster is our own: shards are small
LONGEST_TEMP = 40  # of a folder's path: the sockets below it must fit 107 bytes


def plan(workers: int | None, address: str | None, shards: int) -> tuple[int, int]:
    """Return how many workers a job gets, 0 for as many as fit, and how many threads each.

    Raises:
        UsageError: Ray is not installed, or the address is none that a job can use.
    """
    _import()
    if workers == 0:
        raise UsageError("--workers 0 runs in one process: with --engine ray a job needs a worker")
    if address is not None and "://" in address:
        raise UsageError(
            f"--address {address}: HOST:PORT of the cluster's head is needed (6379 as a rule), and the"
            " command must run on one of the cluster's nodes"
        )
    return workers or 0, 1


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
        predictor: Not used: workers load their own.
        workers: How many; 0: a processor each.
        check: Raises where the job has to stop.
        advance: Told of records and bad records of a shard.
        site: What a worker must find where it runs.

    Raises:
        ManyheadsError: The cluster cannot be used, a shard failed, or ended its worker again and again.
    """
    if not task.store.shared:
        raise UsageError(f"{task.store.name} is in this process's memory: workers cannot reach it")
    if not shards:
        return
    begun = time.monotonic()
    processors = max(os.cpu_count() or 1, workers * task.threads)
    with _cluster(site.address or os.environ.get("RAY_ADDRESS") or None, processors, site.quiet) as ray:
        count = _room(ray, workers, task.threads, len(shards))
        crew = _Crew(ray, task, site, begun)
        try:
            for done in crew.work(shards, count, check):
                advance(done.counts.records, done.counts.bad)
                yield done
        finally:
            crew.end()


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning about GPUs
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'manyheads[ray]'") from error
    return ray


@contextmanager
def _cluster(address: str | None, processors: int, quiet: bool) -> Iterator[Any]:
    """Join the cluster at an address, or start one on this machine; leave or end it afterwards."""
    ray = _import()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    folder, handler = None, signal.getsignal(signal.SIGTERM)
    if address is None:
        if not quiet:
            print(f"no --address: starting Ray on this machine, {processors} processors", file=sys.stderr)
        folder = tempfile.mkdtemp(prefix="mh-", dir=_short_temporary())
        options |= {"address": "local", "num_cpus": processors, "include_dashboard": False}
        options |= {"object_store_memory": STORE_BYTES, "_temp_dir": folder, "_node_ip_address": "127.0.0.1"}
    else:
        _check_answers(address)
        options["address"] = address
    try:
        # Ray prints of dead workers on the standard output, which is the result's.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if quiet else sys.stderr):
            _join(ray, options, address)
            with suppress(ValueError):  # not the main thread: Ray set none either
                signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process at once
            yield ray
            ray.shutdown()
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _join(ray: Any, options: dict[str, Any], address: str | None) -> None:
    try:
        ray.init(**options)
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
        raise ManyheadsError(f"cannot {what}: {why}") from error


def _short_temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMP else "/tmp"


def _check_answers(address: str) -> None:
    """See whether anything answers there: Ray itself would look for a minute.

    Raises:
        UsageError: The address has no port.
        ManyheadsError: Nothing answers.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--address {address}: HOST:PORT of the cluster's head is needed (6379 as a rule)")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise ManyheadsError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): `ray start --head` starts one,"
            " and without --address the job starts its own"
        ) from error


def _room(ray: Any, workers: int, threads: int, shards: int) -> int:
    """Return how many workers to start.

    Raises:
        UsageError: The cluster has no room for so many, or for one.
    """
    sizes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    most = sum(int(size // threads) for size in sizes)
    if most == 0:
        raise UsageError(
            f"a worker of this job takes {threads} processors, and the largest node of the cluster has"
            f" {max(sizes, default=0):g}"
        )
    if workers > most:
        raise UsageError(
            f"--workers {workers}: the cluster has {sum(sizes):g} processors, room for {most} of this job's"
            f" workers with {threads} each"
        )
    return min(workers or most, shards)


class _Crew:
    """The workers of a job, and what each is doing.

    Args:
        ray: The module, connected.
        task: What the shards share.
        site: What a worker must find where it runs.
        begun: When the job began to look for workers.
    """

    def __init__(self, ray: Any, task: Task, site: Site, begun: float) -> None:
        self.ray, self.begun = ray, begun
        self.shared = ray.put((task, site))
        self.kind = ray.remote(num_cpus=task.threads, max_restarts=0, scheduling_strategy="SPREAD")(_Actor)
        self.starting: dict[Any, Any] = {}  # by what it will answer when it is ready
        self.idle: list[tuple[Any, float]] = []  # with the seconds until it was ready, once
        self.running: dict[Any, tuple[Any, float, int, object]] = {}
        self.deaths: Counter[int] = Counter()

    def work(
        self, shards: Sequence[tuple[int, object]], count: int, check: Callable[[], None]
    ) -> Iterator[Done]:
        """Yield shards as they are done."""
        waiting, since = deque(shards), time.monotonic()
        for _ in range(count):
            self._add()
        while waiting or self.running:
            check()
            while waiting and self.idle:
                (actor, ready), (index, shard) = self.idle.pop(), waiting.popleft()
                self.running[actor.run.remote(index, shard)] = (actor, ready, index, shard)
            if self.running:
                since = time.monotonic()
            elif time.monotonic() - since > START_S:
                free = self.ray.available_resources().get("CPU", 0.0)
                raise ManyheadsError(
                    f"no worker could start within {START_S:.0f} s; the cluster has {free:g} free processors"
                    " (other jobs hold the rest?)"
                )
            answers, _ = self.ray.wait([*self.running, *self.starting], num_returns=1, timeout=POLL_S)
            for answer in answers:
                if answer in self.starting:
                    self._started(answer)
                    continue
                actor, ready, index, shard = self.running.pop(answer)
                done = self._result(answer, actor, index)
                if done is None:
                    waiting.appendleft((index, shard))
                    self._add()
                else:
                    self.idle.append((actor, 0.0))
                    yield replace(done, starting=ready)

    def _add(self) -> None:
        actor = self.kind.remote(self.shared)
        self.starting[actor.start.remote()] = actor

    def _started(self, answer: Any) -> None:
        actor = self.starting.pop(answer)
        if self._answer(answer, actor, -1, "a worker died as it started, again and again") is None:
            self._add()
        else:
            self.idle.append((actor, time.monotonic() - self.begun))

    def _result(self, answer: Any, actor: Any, index: int) -> Done | None:
        """Return what a shard came to; None where its worker died and it must be done again."""
        why = f"shard {index} ended {TRIES} workers one after another (killed, or out of memory?)"
        found: Done | None = self._answer(answer, actor, index, why)
        return found

    def _answer(self, answer: Any, actor: Any, key: int, why: str) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self.ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, ManyheadsError | OSError):
                raise error.cause from error
            text = " ".join(str(error.cause).split())[:300]
            raise ManyheadsError(f"a worker failed: {type(error.cause).__name__}: {text}") from error
        except RayError as error:
            self.deaths[key] += 1
            with suppress(Exception):
                self.ray.kill(actor)  # one that was cut off must not go on beside its successor
            if self.deaths[key] >= TRIES:
                text = " ".join(str(error).split())[:300]
                raise ManyheadsError(f"{why}; what is done stays: go on with --resume ({text})") from error
            return None

    def end(self) -> None:
        """End all workers, and wait until they are gone: they may be writing."""
        busy = [*self.running, *self.starting]
        actors = [*(each[0] for each in self.running.values()), *self.starting.values()]
        for actor in (*actors, *(each[0] for each in self.idle)):
            with suppress(Exception):
                self.ray.kill(actor)
        if busy:
            with suppress(Exception):
                self.ray.wait(busy, num_returns=len(busy), timeout=10.0)


class _Actor:
    """A worker on the cluster.

    Args:
        shared: The job's task, and what it must find here.
    """

    def __init__(self, shared: tuple[Task, Site]) -> None:
        self.task, self.site = shared
        self.worker = Worker(self.task)

    def start(self) -> bool:
        """See that all that the job needs is here, and load the model."""
        node = f"the node {socket.gethostname()}"
        with suppress(OSError):
            os.chdir(self.site.folder)
        if not locks.is_of(locks.settled(self.task.store), self.task.run):
            raise UsageError(
                f"{node} does not see the output folder {self.task.store.name}:"
                " choose one on a file system that all nodes share"
            )
        try:
            self.site.check()
            self.site.prepare(self.worker.load())
        except ManyheadsError as error:
            error.args = (f"{node}: {error}",)
            raise
        return True

    def run(self, index: int, shard: object) -> Done:
        """Run a shard."""
        return self.worker.run(index, shard, _nothing)


def _nothing(records: int, bad: int) -> None:
    """Batches are not told of: a killed worker needs no sign to stop."""
