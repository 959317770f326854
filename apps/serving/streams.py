"""Recognition of recordings that go on, over a websocket.

The client begins with a text message, `{"sample_rate": 16000, "encoding": "pcm16"}` (or `float32`; optional
`endpoints`: none, energy or silero), and is told `{"type": "ready", ...}`. Then it sends samples as binary
messages, of one channel at that rate, little-endian, of any length, and gets `{"type": "row", ...}` for each
row that is new. With a text message `{"type": "finish"}` it ends, and gets the last rows and `{"type":
"done"}`. Rows are those of `predictor.stream`, whatever the sizes of the messages.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from manyheads.apps.serving.guard import request_id
from manyheads.apps.serving.payload import Problem, Step
from manyheads.apps.serving.process import Worker, WorkerDied
from manyheads.apps.serving.queue import Model, Refused

log = logging.getLogger("manyheads.serving")

MOST_BYTES = 1 << 20  # of a message
TRY_LATER, TOO_LARGE, FAILED, WRONG = 1013, 1009, 1011, 1008  # codes of a websocket's end
CODES = {429: TRY_LATER, 503: TRY_LATER, 413: TOO_LARGE, 500: FAILED}


class Begin(BaseModel):
    """The first message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["start"] = "start"
    sample_rate: Annotated[int, Field(ge=1000, le=384_000)]
    encoding: Literal["pcm16", "float32"] = "pcm16"
    endpoints: Literal["none", "energy", "silero"] = "none"


@dataclass
class Streams:
    """The recordings that go on.

    Args:
        most: Of them at once.
        idle_s: That a client may be silent.
        seconds: Of one recording.
    """

    most: int = 16
    idle_s: float = 30
    seconds: float = 3600
    open: int = 0
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def serve(self, socket: WebSocket, model: Model) -> None:
        """Serve one recording.

        Raises:
            Refused: It is not begun, or cannot go on.
        """
        if model.about is None or not model.about.sample_rate:
            raise Refused(Problem(404, "no_stream", f"the model {model.name} takes whole recordings only"))
        if not model.workers:
            raise Refused(Problem(503, "not_ready", f"the model {model.name} is not ready"), 5)
        if self.open >= self.most:
            raise Refused(Problem(429, "busy", "too many recordings go on; try again later"), 5)
        self.open += 1
        model.metrics.sessions.labels(model.name).set(self.open)
        number, worker = next(self.numbers), min(model.workers.values(), key=lambda each: each.sessions)
        worker.sessions += 1
        try:
            await socket.accept()
            await self._serve(socket, model, Session(number, worker))
        except WebSocketDisconnect:
            pass
        finally:
            self.open -= 1
            worker.sessions -= 1
            model.metrics.sessions.labels(model.name).set(self.open)
            with suppress(WorkerDied):
                await worker.ask(Step(number, "close"))

    async def _serve(self, socket: WebSocket, model: Model, session: Session) -> None:
        assert model.about is not None
        begin = _begin(await self._receive(socket), model.about.sample_rate)
        [opened] = await session.do("open", endpoints=begin.endpoints)
        await socket.send_json(
            {
                "type": "ready",
                "request_id": request_id.get(),
                "sample_rate": model.about.sample_rate,
                **opened,
            }
        )
        left = self.seconds * begin.sample_rate
        while True:
            message = await self._receive(socket)
            if isinstance(message, str):
                _check_finish(message)
                break
            samples = _samples(message, begin.encoding)
            left -= len(samples)
            if left < 0:
                raise Refused(Problem(413, "too_long", f"a recording has at most {self.seconds:g} s"))
            for row in await session.do("push", samples.tobytes()):
                await socket.send_json({"type": "row", **row})
        for row in await session.do("finish"):
            await socket.send_json({"type": "row", **row})
        await socket.send_json({"type": "done"})
        await socket.close()

    async def _receive(self, socket: WebSocket) -> str | bytes:
        """Return the next message.

        Raises:
            Refused: None came for too long, or it is too large.
        """
        try:
            message = await asyncio.wait_for(socket.receive(), self.idle_s)
        except TimeoutError:
            raise Refused(Problem(408, "idle", f"nothing came for {self.idle_s:g} s")) from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        found: str | bytes = message["bytes"] if text is None else text
        if len(found) > MOST_BYTES:
            raise Refused(Problem(413, "too_large", f"a message has at most {MOST_BYTES:,} bytes"))
        return found

    async def refuse(self, socket: WebSocket, error: Refused) -> None:
        """Say why a recording does not go on, and end it."""
        problem = error.problem
        if problem.log:
            log.error("%s %s: %s", request_id.get(), problem.message, problem.log)
        with suppress(RuntimeError, WebSocketDisconnect):  # the client is gone
            if socket.application_state == WebSocketState.CONNECTING:
                await socket.accept()  # before that a client would see 403 alone
            found: dict[str, Any] = {"type": "error", "code": problem.code, "message": problem.message}
            await socket.send_json({**found, "request_id": request_id.get()})
            await socket.close(CODES.get(problem.status, WRONG), problem.code)


@dataclass(frozen=True)
class Session:
    """A recording in a worker."""

    number: int
    worker: Worker

    async def do(self, action: str, samples: bytes = b"", endpoints: str = "none") -> list[dict[str, Any]]:
        """Do a step.

        Raises:
            Refused: It fails, or the worker died.
        """
        try:
            found = await self.worker.ask(Step(self.number, action, samples, endpoints))
        except WorkerDied as error:
            problem = Problem(503, "worker_died", "the model's worker failed; begin again", log=str(error))
            raise Refused(problem, 1) from None
        if isinstance(found, Problem):
            raise Refused(found)
        rows: list[dict[str, Any]] = found
        return rows


def _begin(message: str | bytes, sample_rate: int) -> Begin:
    try:
        found = Begin.model_validate_json(message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the first message"
        raise Refused(Problem(422, "invalid_request", f"{where}: {first['msg']}"[:200])) from None
    if found.sample_rate != sample_rate:
        message = f"sample_rate: this model takes {sample_rate}, not {found.sample_rate}"
        raise Refused(Problem(422, "invalid_request", message))
    return found


def _check_finish(message: str) -> None:
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        found = None
    if found != {"type": "finish"}:
        raise Refused(Problem(422, "invalid_request", 'send samples, or {"type": "finish"}'))


def _samples(message: bytes, encoding: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a message's samples; raises Refused for half of one, NaN and infinite ones."""
    size = 2 if encoding == "pcm16" else 4
    if len(message) % size:
        raise Refused(Problem(422, "invalid_data", f"a message ends within a sample of {size} bytes"))
    if encoding == "pcm16":
        return np.frombuffer(message, "<i2").astype(np.float32) / np.float32(32768)
    found = np.frombuffer(message, "<f4")
    if not np.isfinite(found).all():
        raise Refused(Problem(422, "invalid_data", "NaN or infinite samples"))
    return found
