"""The requests of one model: admitted or turned away, put together, answered by its workers in time.

A request is admitted if the queue has a place and it can be expected to be answered before its deadline;
else it is turned away at once (429), which costs nothing. One whose deadline passes, or whose client left, is
taken out of the queue; in a worker it is left out from the next batch of records on. A worker that dies or
hangs is started anew, and what it had is answered 503.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from manyheads.apps.serving.metrics import Metrics
from manyheads.apps.serving.payload import About, Answer, Problem, Work
from manyheads.apps.serving.process import Plan, Worker, WorkerDied
from manyheads.core.errors import ManyheadsError

log = logging.getLogger("manyheads.serving")

SHARE = 0.4  # of the deadline that a request may be expected to wait: others may take longer than expected
REMEMBERED = 8  # batches
SHED_S = 0.5  # between two looks at what waits
BATCH_S = 1.0  # that a batch should take at most; requests that are expected to take longer go alone
UNKNOWN_BATCH = 8  # requests of a batch, as long as it is not known how long they take
LONGEST_PAUSE_S = 30  # between two starts of a worker that keeps dying


class Refused(Exception):
    """A request is not answered with rows.

    Args:
        problem: Why.
        retry_after: Seconds after which to try again.
    """

    def __init__(self, problem: Problem, retry_after: int | None = None) -> None:
        super().__init__(problem.message)
        self.problem, self.retry_after = problem, retry_after


@dataclass(frozen=True)
class Policy:
    """How requests are queued.

    Args:
        queue: Requests that may wait.
        wait_s: How long the first of a batch waits for others.
        deadline_s: From a request's admission to its answer.
    """

    queue: int = 128
    wait_s: float = 0.005
    deadline_s: float = 30


@dataclass(eq=False)
class Ticket:
    """An admitted request.

    Args:
        work: What to do.
        arrived: When, on the loop's clock.
        future: Its answer.
        leave: Tells the worker that has it not to go on.
    """

    work: Work
    arrived: float
    future: asyncio.Future[Answer]
    leave: Callable[[], None] | None = None


@dataclass
class Rate:
    """Seconds that a request takes a worker.

    Args:
        each: About, of late ones more than of early ones: by this batches are made.
        recent: Of the last batches; the longest of them says what may be admitted.
        running: When the batches began that are not done, and their requests.
    """

    each: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    running: dict[int, tuple[float, int]] = field(default_factory=dict)

    def begin(self, worker: int, requests: int) -> None:
        """Note that a batch begins."""
        self.running[worker] = (time.perf_counter(), requests)

    def end(self, worker: int) -> float:
        """Note that it is done, and return its seconds."""
        begin, requests = self.running.pop(worker)
        seconds = time.perf_counter() - begin
        self.recent.append(seconds / requests)
        self.each = 0.7 * self.each + 0.3 * self.recent[-1] if self.each else self.recent[-1]
        return seconds

    def usual(self) -> float:
        """Return what a request takes about, those among them that are not done."""
        now = time.perf_counter()
        return max([self.each, *((now - begin) / requests for begin, requests in self.running.values())])

    def worst(self) -> float:
        """Return what a request may take, by the last batches and those that are not done."""
        return max([self.usual(), *self.recent])


@dataclass
class Model:
    """A served model: its queue and its workers.

    Args:
        plan: How its workers are run.
        policy: How requests are queued.
        metrics: Where it counts.
        count: Workers.
    """

    plan: Plan
    policy: Policy
    metrics: Metrics
    count: int = 1
    about: About | None = None
    workers: dict[int, Worker] = field(default_factory=dict)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0
    rate: Rate = field(default_factory=Rate)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name in addresses."""
        return self.plan.model.name

    @property
    def ready(self) -> bool:
        """Whether a worker answers."""
        return bool(self.workers)

    async def start(self) -> None:
        """Start the workers and wait until all are ready.

        Raises:
            ManyheadsError: The model cannot be loaded.
        """
        started = await asyncio.gather(*(self._start(i) for i in range(self.count)))
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in started]
        self._tasks.append(asyncio.create_task(self._shed()))

    async def _start(self, number: int) -> Worker:
        worker = Worker(self.plan, number)
        try:
            self.about = await worker.begin()
        except BaseException:
            await worker.close()
            raise
        self.workers[number] = worker
        self.metrics.workers.labels(self.name).set(len(self.workers))
        return worker

    def check_admission(self) -> None:
        """Refuse a request that has no place, or cannot be expected to be answered in time.

        Raises:
            Refused: 429 with a time after which to try again, or 503.
        """
        if not self.workers:
            raise Refused(Problem(503, "not_ready", f"the model {self.name} is not ready"), 5)
        ahead = len(self.waiting) + self.running
        wait = ahead * self.rate.worst() / len(self.workers)
        if len(self.waiting) >= self.policy.queue or (ahead and wait > SHARE * self.policy.deadline_s):
            raise _busy(wait)

    async def submit(self, work: Work, left: asyncio.Future[None] | None = None) -> Answer:
        """Answer a request.

        Args:
            work: The request.
            left: Done when its client has left.

        Raises:
            Refused: It is turned away, or its deadline passed (504), or its worker died (503).
        """
        self.check_admission()
        loop = asyncio.get_running_loop()
        ticket = Ticket(work, loop.time(), loop.create_future())
        self.waiting.append(ticket)
        self._count_waiting()
        self._arrived.set()
        try:
            watched: list[asyncio.Future[Any]] = [ticket.future, *([] if left is None else [left])]
            await asyncio.wait(watched, timeout=self.policy.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if ticket.future.done():
                return ticket.future.result()
            if left is not None and left.done():
                raise Refused(Problem(499, "left", "the client left"))
            raise Refused(Problem(504, "deadline", f"no answer in {self.policy.deadline_s:g} s"))
        finally:
            self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        """Forget a request: what is not begun is not done, what is begun is not gone on with."""
        if ticket.future.done():
            return
        ticket.future.cancel()
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            self._count_waiting()
        elif ticket.leave is not None:
            ticket.leave()

    def _count_waiting(self) -> None:
        self.metrics.queue.labels(self.name).set(len(self.waiting))

    async def _serve(self, worker: Worker) -> None:
        """Give a worker batches; start another when it died."""
        while True:
            tickets: list[Ticket] = []
            try:
                tickets = await self._next(worker)
                await self._answer(worker, tickets)
            except WorkerDied as error:
                self._fail(tickets, str(error))
                worker = await self._replace(worker, str(error))

    async def _next(self, worker: Worker) -> list[Ticket]:
        """Wait for requests, and watch the worker meanwhile.

        Raises:
            WorkerDied: It ended; what came waits for the next one.
        """
        gathering = asyncio.ensure_future(self._gather())
        try:
            watched: list[asyncio.Future[Any]] = [gathering, worker.ended]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if not worker.ended.done():
                return gathering.result()
            if gathering.done():
                self.waiting.extendleft(reversed(gathering.result()))
            raise WorkerDied("a worker process died")
        finally:
            gathering.cancel()

    async def _gather(self) -> list[Ticket]:
        """Wait for requests: for the first as long as it takes, for others a moment."""
        while not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        most, clock = self._most_together(), asyncio.get_running_loop().time
        while 0 < len(self.waiting) < most:
            rest = self.waiting[0].arrived + self.policy.wait_s - clock()
            if rest <= 0:
                break
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), rest)
            except TimeoutError:
                break
        found = [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]
        self._count_waiting()
        return found

    def _most_together(self) -> int:
        """How many requests go to a worker at once: few where each takes long, all are done together."""
        if not self.rate.each:
            return min(UNKNOWN_BATCH, self.plan.batch)
        return max(1, min(self.plan.batch, int(BATCH_S / self.rate.each)))

    async def _shed(self) -> None:
        """Turn away, once it shows, what waits and will be too late: others took longer than expected."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(SHED_S)
            each = self.rate.usual() / max(1, len(self.workers))
            for place, ticket in reversed(list(enumerate(self.waiting, 1 + self.running))):
                if clock() + place * each <= ticket.arrived + self.policy.deadline_s:
                    break
                if not ticket.future.done():
                    ticket.future.set_exception(_busy(place * each))
                self.waiting.remove(ticket)
            self._count_waiting()

    async def _answer(self, worker: Worker, tickets: list[Ticket]) -> None:
        """Have a batch answered."""
        if not tickets:  # another worker was faster
            return
        for number, ticket in enumerate(tickets):
            worker.cancelled[number] = 0
            ticket.leave = _leaver(worker, number)
        self.running += len(tickets)
        self.rate.begin(worker.number, len(tickets))
        try:
            answers: list[Answer] = await worker.ask([ticket.work for ticket in tickets])
        finally:
            self.running -= len(tickets)
            seconds = self.rate.end(worker.number)
            for ticket in tickets:
                ticket.leave = None
        self.metrics.batch_seconds.labels(self.name).observe(seconds)
        self.metrics.batch_size.labels(self.name).observe(len(tickets))
        for ticket, answer in zip(tickets, answers, strict=True):
            self.metrics.records.labels(self.name, "bad").inc(answer.bad)
            self.metrics.records.labels(self.name, "good").inc(answer.records - answer.bad)
            if not ticket.future.done():
                ticket.future.set_result(answer)

    def _fail(self, tickets: list[Ticket], reason: str) -> None:
        for ticket in tickets:
            if not ticket.future.done():
                problem = Problem(503, "worker_died", "the model's worker failed; try again", log=reason)
                ticket.future.set_exception(Refused(problem, 1))

    async def _replace(self, worker: Worker, reason: str) -> Worker:
        """Start a worker in place of one that died; if that fails, again, less and less often."""
        log.error("model %s: %s; it is started anew", self.name, reason)
        self.workers.pop(worker.number, None)
        self.metrics.workers.labels(self.name).set(len(self.workers))
        self.metrics.restarts.labels(self.name).inc()
        worker.kill()
        await worker.close()
        pause = 1.0
        while True:
            try:
                return await self._start(worker.number)
            except ManyheadsError as error:
                log.error("model %s: no worker starts (%s); again in %g s", self.name, error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def close(self) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self.workers.values()))
        self.workers.clear()


def _busy(wait: float) -> Refused:
    """Return the answer to a request that has no place: how long others wait tells when to come back."""
    after = min(60, max(1, math.ceil(wait / 2)))
    return Refused(Problem(429, "busy", "too many requests wait; try again later"), after)


def _leaver(worker: Worker, number: int) -> Callable[[], None]:
    def leave() -> None:
        worker.cancelled[number] = 1

    return leave
