"""A worker as the server sees it: a process that is asked through a pipe, and killed where it hangs."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias

from manyheads.apps.serving import worker
from manyheads.apps.serving.payload import About, Failed, Limits, Served
from manyheads.core.errors import ManyheadsError

STOP_S = 5  # that a worker may take to end by itself


class WorkerDied(ManyheadsError):
    """A worker is gone: it was killed, crashed, or hung."""


class Running(Protocol):
    """A worker's process."""

    def start(self) -> None:
        """Begin."""

    def kill(self) -> None:
        """End it at once."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""


Start: TypeAlias = Callable[[Connection, tuple[Any, ...]], Running]


def in_process(connection: Connection, arguments: tuple[Any, ...]) -> Running:
    """Make a worker that is a process of its own: what it does wrong stays in there."""
    context = multiprocessing.get_context("spawn")
    return context.Process(
        target=worker.work, args=(connection, *arguments), daemon=True, name="manyheads-worker"
    )


class InThread:
    """A worker in a thread of this process, for tests: it cannot be killed."""

    def __init__(self, connection: Connection, arguments: tuple[Any, ...]) -> None:
        self.connection = connection
        self.thread = threading.Thread(target=self._work, args=arguments, daemon=True)

    def _work(self, *arguments: Any) -> None:
        try:
            worker.work(self.connection, *arguments)
        finally:
            self.connection.close()

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def kill(self) -> None:
        """Leave it to end by itself."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        self.thread.join(timeout)


@dataclass(frozen=True)
class Plan:
    """How the workers of a model are run.

    Args:
        model: What they load.
        limits: What a request may hold.
        batch: Requests that are answered together, at most.
        device: Where the workers run: "cpu", "cuda" (by turns where there are several), or "auto".
        threads: Of torch in each.
        stuck_s: A batch that takes longer ends the worker.
        start: Makes a worker.
    """

    model: Served
    limits: Limits = field(default_factory=Limits)
    batch: int = 64
    device: str = "auto"
    threads: int = 1
    stuck_s: float = 120
    start: Start = in_process


class Worker:
    """One running worker.

    Args:
        plan: How it is run.
        number: Among the workers of its model.
    """

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.number = plan, number
        self.cancelled: MutableSequence[int] = multiprocessing.get_context("spawn").RawArray("b", plan.batch)
        self.lock = asyncio.Lock()
        self.sessions = 0  # recordings that go on in it
        device = f"{plan.device}:{number}"
        threads = plan.threads if plan.start is in_process else 0
        self.connection, theirs = multiprocessing.Pipe()
        self._process = plan.start(theirs, (plan.model, plan.limits, self.cancelled, device, threads))
        self._thread = ThreadPoolExecutor(1, f"manyheads-{plan.model.name}")
        self._theirs: Connection | None = theirs if plan.start is in_process else None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sentinel: int | None = None  # readable when the process has ended

    async def begin(self) -> About:
        """Start it, and wait until its model is loaded.

        Raises:
            ManyheadsError: The model cannot be loaded.
            WorkerDied: The process ended.
        """
        found = await self._in_thread(self._begin)
        self._sentinel = getattr(self._process, "sentinel", None)
        if self._sentinel is not None:
            asyncio.get_running_loop().add_reader(self._sentinel, self._note_end)
        if isinstance(found, Failed):
            raise ManyheadsError(found.message)
        assert isinstance(found, About)
        return found

    def _note_end(self) -> None:
        """The process has ended, whether it was asked something or not."""
        self._forget_sentinel()
        if not self.ended.done():
            self.ended.set_result(None)

    def _forget_sentinel(self) -> None:
        if self._sentinel is not None:
            asyncio.get_running_loop().remove_reader(self._sentinel)
            self._sentinel = None

    def _begin(self) -> object:
        self._process.start()
        if self._theirs is not None:
            self._theirs.close()  # it is the child's: when that dies, reading here ends
        return self._receive()

    async def ask(self, message: object) -> Any:
        """Send a message and return the reply.

        Raises:
            WorkerDied: The process ended, or hung and was killed.
        """
        async with self.lock:
            waiting = asyncio.ensure_future(self._in_thread(self._exchange, message))
            done, _ = await asyncio.wait([waiting], timeout=self.plan.stuck_s)
            if not done:
                self.kill()
                await asyncio.wait([waiting], timeout=STOP_S)
                waiting.cancel()
                raise WorkerDied(f"a worker took longer than {self.plan.stuck_s:g} s and was ended")
            return waiting.result()

    def _exchange(self, message: object) -> object:
        try:
            self.connection.send(message)
        except OSError as error:
            raise WorkerDied("a worker process died") from error
        return self._receive()

    def _receive(self) -> object:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied("a worker process died") from error

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    async def close(self) -> None:
        """End it: by itself if it is idle, else killed."""
        self._forget_sentinel()
        self.connection.close()
        await asyncio.get_running_loop().run_in_executor(None, self._end)
        self._thread.shutdown(wait=False)

    def _end(self) -> None:
        self._process.join(STOP_S)
        self._process.kill()
        self._process.join(STOP_S)

    async def _in_thread(self, function: Callable[..., object], *arguments: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
