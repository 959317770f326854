"""A worker of the server: one model in a process of its own, which answers batches of requests.

What a request holds goes through the same steps as in a batch job: shards, read, prepare, collate, forward,
rows. Records of several requests share the model's batches; each request gets its own rows, in the columns'
types that a job's parts have. A request that fails takes no other with it: those of its batch run again, each
alone.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from manyheads.apps.serving import rows as rows_of
from manyheads.apps.serving.payload import (
    About,
    Answer,
    Blobs,
    Failed,
    Limits,
    Problem,
    Served,
    Settings,
    Step,
    Work,
)
from manyheads.apps.serving.sources import example, screen, source_of
from manyheads.core import hub
from manyheads.core.errors import BadRecord, DataError, ManyheadsError, UsageError
from manyheads.core.predictor import AnyPredictor, Bad, Row, Spent, configure, part, predict, prepared

SHARD = 1024  # records of a source that are listed at once
TOGETHER = {"speech": 4}  # records; segments take long, and a request that is given up stops behind a batch
CONFIGURED = 8  # predictors of other settings that are kept
OPTION = re.compile(r"--([a-z][a-z-]+)")  # as the command line calls a setting
PICTURE = "explanation.png"
NAMED = 20  # bad records that an error lists


@dataclass
class Task:
    """A request on its way through the model.

    Args:
        number: Its place among the requests that came together.
        work: The request.
        stack: Removes its files in the end.
    """

    number: int
    work: Work
    stack: ExitStack
    rows: list[Row] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    records: int = 0
    problem: Problem | None = None

    @cached_property
    def folder(self) -> Path:
        """Where its files lie; made when it is needed, for most need none."""
        return Path(self.stack.enter_context(TemporaryDirectory(prefix="manyheads-")))

    def clean(self, text: str) -> str:
        """Return a message without the folder's name, and with the request's word for a table in memory."""
        if "folder" in vars(self):
            text = text.replace(f"{self.folder}/", "").replace(str(self.folder), "the input")
        return text.replace("the DataFrame", "the request").replace("DataFrame", self.work.payload.field)

    def refuse(self, error: BaseException, field: str = "") -> None:
        """Note that the request's data, or another field of it, cannot be used."""
        reason = OPTION.sub(lambda found: found[1].replace("-", "_"), self.clean(str(error)))
        detail = {"field": field or self.work.payload.field, "reason": reason}
        self.problem = Problem(422, "invalid_data", reason, (detail,))

    def fail(self, error: BaseException) -> None:
        """Note that the model, or the code, failed."""
        log = "".join(traceback.format_exception(error))
        self.problem = Problem(500, "model_failed", "the model could not answer this request", log=log)


class Engine:
    """A loaded model that answers.

    Args:
        model: Which.
        predictor: Its predictor.
        limits: What a request may hold.
        cancelled: A flag for each request of a batch: its answer is not waited for any more.
    """

    def __init__(
        self, model: Served, predictor: AnyPredictor, limits: Limits, cancelled: MutableSequence[int]
    ) -> None:
        self.model, self.predictor, self.limits, self.cancelled = model, predictor, limits, cancelled
        self._configured: dict[tuple[tuple[str, str | int], ...], AnyPredictor] = {}
        self._sessions: dict[int, Any] = {}

    def answer(self, works: Sequence[Work]) -> list[Answer]:
        """Answer requests that came together."""
        answers: dict[int, Answer] = {}
        order = sorted(range(len(works)), key=lambda i: _key(works[i].settings))
        with ExitStack() as stack:
            for _, group in groupby(order, key=lambda i: _key(works[i].settings)):
                numbers = list(group)
                for task in self._tasks(works, numbers, stack):
                    answers[task.number] = self._answer(task)
        return [answers[i] for i in range(len(works))]

    def _tasks(self, works: Sequence[Work], numbers: Sequence[int], stack: ExitStack) -> list[Task]:
        """Run requests of the same settings together, and where that fails, one by one."""
        tasks = [Task(number, works[number], stack) for number in numbers]
        try:
            predictor = self._with(works[numbers[0]].settings)
        except UsageError as error:
            for task in tasks:
                task.refuse(error, "settings")
            return tasks
        try:
            self._run(predictor, tasks)
        except (UsageError, DataError) as error:
            if len(tasks) == 1:
                tasks[0].refuse(error)
                return tasks
        except Exception as error:
            if len(tasks) == 1:
                tasks[0].fail(error)
                return tasks
        else:
            return tasks
        return [task for number in numbers for task in self._tasks(works, [number], stack)]

    def _with(self, settings: Settings) -> AnyPredictor:
        """Return the predictor of other settings; the last few are kept."""
        if not settings:
            return self.predictor
        key = _key(settings)
        if key not in self._configured:
            if len(self._configured) >= CONFIGURED:
                self._configured.pop(next(iter(self._configured)))
            self._configured[key] = configure(self.predictor, settings)
        return self._configured[key]

    def _run(self, predictor: AnyPredictor, tasks: Sequence[Task]) -> None:
        """Put the records of all requests through the model."""
        owners: deque[Task] = deque()
        stream = self._records(predictor, tasks, owners)
        size = TOGETHER.get(self.model.domain, predictor.batch_size)
        for chunk in prepared(predictor, stream, size, Spent()):
            good = []
            for record, sample, reason in chunk:
                task = owners.popleft()
                task.records += 1
                if reason is not None:
                    task.bad.append(Bad(record.id, reason))
                elif task.problem is None and not self.cancelled[task.number]:
                    good.append((task, record, sample))
            if good:
                self._forward(predictor, good)

    def _records(
        self, predictor: AnyPredictor, tasks: Sequence[Task], owners: deque[Task]
    ) -> Iterator[object]:
        """Yield the records of requests one behind the other, and note whose each is."""
        for task in tasks:
            try:
                for record in self._read(predictor, task):
                    if self.cancelled[task.number]:
                        break
                    owners.append(task)
                    yield record
            except (DataError, UsageError) as error:
                task.refuse(error)

    def _read(self, predictor: AnyPredictor, task: Task) -> Iterator[object]:
        payload, found = screen(task.work.payload, self.limits)
        task.bad += found
        task.records += len(found)
        if isinstance(payload, Blobs) and not payload.items:
            return
        source = source_of(payload, predictor, self.model.domain, lambda: task.folder)
        for shard in predictor.shards(source, SHARD):
            yield from predictor.read(shard)

    def _forward(self, predictor: AnyPredictor, good: Sequence[tuple[Task, Any, Any]]) -> None:
        """Run a batch, and give each request its rows."""
        outputs = predictor.forward(predictor.collate([sample for _, _, sample in good]))
        first = 0
        for _, group in groupby(good, key=lambda each: each[0].number):
            own = list(group)
            end = first + len(own)
            records = [record for _, record, _ in own]
            own[0][0].rows += predictor.rows(part(outputs, first, end), records)
            first = end

    def _answer(self, task: Task) -> Answer:
        """Make the response of a request."""
        if self.cancelled[task.number]:
            task.problem = Problem(504, "deadline", "the request was given up")
        elif task.problem is None and len(task.bad) == task.records:
            task.problem = _nothing_good(task)
        if task.problem is not None:
            return Answer(records=task.records, bad=len(task.bad), problem=task.problem)
        try:
            result = rows_of.finish(task.rows, self._with(task.work.settings), lambda: task.folder)
            if task.work.picture and isinstance(task.work.payload, Blobs):
                from manyheads.apps.explaining import picture

                result.files[PICTURE] = picture(self.predictor, task.work.payload.items[0][1])
            bad = [{"id": each.id, "reason": task.clean(each.reason)} for each in task.bad]
            encode = rows_of.as_zip if task.work.zipped else rows_of.as_json
            body = encode(self.model.name, result, bad)
        except Exception as error:
            task.fail(error)
            return Answer(records=task.records, bad=len(task.bad), problem=task.problem)
        media_type = "application/zip" if task.work.zipped else "application/json"
        return Answer(body, media_type, task.records, len(task.bad))

    def step(self, step: Step) -> list[dict[str, Any]] | Problem:
        """Do a step of a recording that goes on; return its new rows, or of the first step its latency."""
        import numpy as np
        import torch

        try:
            if step.action == "open":
                streamed: Any = self.predictor
                stream = self._sessions[step.session] = streamed.stream(endpoints=step.endpoints)
                return [{"latency_ms": stream.latency_ms}]
            if step.action == "close":
                self._sessions.pop(step.session, None)
                return []
            stream = self._sessions[step.session]
            if step.action == "finish":
                del self._sessions[step.session]
                return [dict(row) for row in stream.finish()]
            samples = torch.from_numpy(np.frombuffer(step.samples, "<f4").copy())
            with torch.inference_mode():
                return [dict(row) for row in stream.push(samples)]
        except (DataError, UsageError) as error:
            return Problem(422, "invalid_data", str(error))
        except Exception as error:
            log = "".join(traceback.format_exception(error))
            return Problem(500, "model_failed", "the model could not go on", log=log)


def _key(settings: Settings) -> tuple[tuple[str, str | int], ...]:
    return tuple(sorted(settings.items()))


def _nothing_good(task: Task) -> Problem:
    """What to say where no record can be used."""
    if not task.records:
        return Problem(422, "invalid_data", "there is no record in the request")
    details = tuple(
        {"field": task.work.payload.field, "id": bad.id, "reason": task.clean(bad.reason)}
        for bad in task.bad[:NAMED]
    )
    first = details[0]
    more = f" (and {len(task.bad) - 1} more)" if len(task.bad) > 1 else ""
    return Problem(422, "invalid_data", f"{first['id']}: {first['reason']}{more}", details)


def load(model: Served, limits: Limits, cancelled: MutableSequence[int], device: str) -> tuple[Engine, About]:
    """Load a model, and try it on an example.

    Raises:
        ManyheadsError: It cannot be loaded.
    """
    begin = time.perf_counter()
    device = _place(device)
    module, config = hub.load_model(model.folder)
    predictor = hub.make_predictor(module.to(device), config)
    loaded = time.perf_counter()
    note = ""
    try:
        predict(predictor, example(predictor, model.domain))
    except (DataError, BadRecord, UsageError) as error:
        note = str(error)
    rate, latency = _streaming(predictor)
    engine = Engine(model, predictor, limits, cancelled)
    about = About(
        identity=config.identity,
        columns=dict(predictor.columns),
        settings=dict(getattr(predictor, "settings", {})),
        batch_size=predictor.batch_size,
        device=device,
        load_s=loaded - begin,
        warm_up_s=time.perf_counter() - loaded,
        note=note,
        sample_rate=rate,
        latency_ms=latency,
    )
    return engine, about


def _place(device: str) -> str:
    """Return torch's name of the device of a worker.

    Raises:
        UsageError: There is no GPU.
    """
    import torch

    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "cuda" and not count:
        raise UsageError("--device cuda: torch finds no GPU here")
    return f"cuda:{int(number) % count}" if count else "cpu"


def _streaming(predictor: Any) -> tuple[int, int]:
    """Return the sample rate and latency of a recogniser that can take recordings while they go on."""
    if not hasattr(predictor, "stream"):
        return 0, 0
    try:
        return predictor.sample_rate, predictor.stream().latency_ms
    except UsageError:  # not built with streaming=True
        return 0, 0


def work(
    connection: Connection,
    model: Served,
    limits: Limits,
    cancelled: MutableSequence[int],
    device: str = "auto:0",
    threads: int = 0,
) -> None:
    """Answer what comes through a connection until it is closed.

    Args:
        connection: To the server.
        model: What to load.
        limits: What a request may hold.
        cancelled: A flag for each request of a batch.
        device: Where the model runs: `auto:N`, `cpu:N` or `cuda:N` for worker number N.
        threads: Of torch; 0 leaves them as they are.
    """
    if threads and threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):  # the server ends it: it closes the connection
            signal.signal(signum, signal.SIG_IGN)
    try:
        if threads:
            import torch

            torch.set_num_threads(threads)
        engine, about = load(model, limits, cancelled, device)
    except ManyheadsError as error:
        connection.send(Failed(str(error)))
        return
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        connection.send(Failed(f"{type(error).__name__}: {error}"))
        return
    connection.send(about)
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(engine.step(message) if isinstance(message, Step) else engine.answer(message))
