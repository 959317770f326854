"""The addresses of the server.

`/livez` (the process runs), `/readyz` (all models answer and the server is not about to end), `/metrics`,
`/openapi.json`, `/v1/models`, `/v1/models/NAME`, `/v1/models/NAME/predict`, and for recognisers that take a
recording while it goes on a websocket `/v1/models/NAME/stream`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from manyheads import __version__
from manyheads.apps.serving import openapi, requests
from manyheads.apps.serving.guard import Guard, Rules, error_body, request_id
from manyheads.apps.serving.metrics import Metrics
from manyheads.apps.serving.payload import Answer, Problem, Work
from manyheads.apps.serving.queue import Model, Refused
from manyheads.apps.serving.streams import Streams
from manyheads.core.errors import did_you_mean

log = logging.getLogger("manyheads.serving")


@dataclass
class Service:
    """The models that are served, and whether the server is about to end.

    Args:
        models: By name.
        metrics: What is counted.
        draining: What is admitted is finished; nothing new is.
        active: Requests and recordings that are not done.
    """

    models: dict[str, Model]
    metrics: Metrics
    streams: Streams = field(default_factory=Streams)
    draining: bool = False
    active: int = 0

    @property
    def ready(self) -> bool:
        """Whether all models answer, and new requests are taken."""
        return not self.draining and all(model.ready for model in self.models.values())

    def find(self, name: str) -> Model:
        """Return a model.

        Raises:
            Refused: 404 where there is none of this name.
        """
        if name not in self.models:
            close = did_you_mean(name[:100], self.models)
            raise Refused(Problem(404, "no_model", f"no model of this name{close} (/v1/models lists them)"))
        return self.models[name]

    def check_open(self) -> None:
        """Refuse what is new where the server is about to end."""
        if self.draining:
            raise Refused(Problem(503, "draining", "the server is about to end"), 5)

    async def predict(self, model: Model, work: Work, left: asyncio.Future[None] | None = None) -> Answer:
        """Answer a request; also what a page of this server calls.

        Raises:
            Refused: There are no rows, and why.
        """
        self.check_open()
        answer = await model.submit(work, left)
        if answer.problem is not None:
            raise Refused(answer.problem)
        return answer


def make_app(service: Service, rules: Rules, quiet: bool = False) -> tuple[FastAPI, Guard]:
    """Return the application, to which a page may be added, and the same behind its guard."""
    app = FastAPI(title="Manyheads", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(ClientDisconnect, _left)
    _add_probes(app, service)
    _add_models(app, service)

    @app.get("/openapi.json")
    async def schema() -> JSONResponse:
        return JSONResponse(openapi.document(service.models.values(), rules.token is not None))

    return app, Guard(app, rules, service.metrics, quiet)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/livez")
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        status = "draining" if service.draining else "ready" if service.ready else "not ready"
        models = {name: "ready" if model.ready else "not ready" for name, model in service.models.items()}
        return JSONResponse({"status": status, "models": models}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"models": [describe(model) for model in service.models.values()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(describe(service.find(name)))

    async def predict(request: Request) -> Response:
        name = request.path_params["name"]
        begin, status = time.perf_counter(), 500
        known = service.find(name)
        service.active += 1
        try:
            answer = await _predict(service, known, request)
            status = 200
            return Response(answer.body, media_type=answer.media_type)
        except Refused as error:
            status = error.problem.status
            raise
        except ClientDisconnect:
            status = 499
            raise
        finally:
            service.active -= 1
            service.metrics.requests.labels(name, str(status)).inc()
            service.metrics.seconds.labels(name).observe(time.perf_counter() - begin)

    app.add_route("/v1/models/{name}/predict", predict, methods=["POST"])

    @app.websocket("/v1/models/{name}/stream")
    async def stream(socket: WebSocket, name: str) -> None:
        service.active += 1
        try:
            model = service.find(name)
            service.check_open()
            await service.streams.serve(socket, model)
        except Refused as error:
            await service.streams.refuse(socket, error)
        finally:
            service.active -= 1


async def _predict(service: Service, model: Model, request: Request) -> Answer:
    """Read a request, and answer it unless its client leaves."""
    service.check_open()
    model.check_admission()  # before a byte of the body is read
    work = await requests.read(request, model.plan.model.domain, model.plan.model.task)
    left = asyncio.ensure_future(_gone(request))
    try:
        return await service.predict(model, work, left)
    finally:
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe(model: Model) -> dict[str, Any]:
    """Say what a model is, what it takes and what it returns."""
    served, about = model.plan.model, model.about
    found: dict[str, Any] = {
        "name": served.name,
        "domain": served.domain,
        "task": served.task,
        "architecture": served.catalog_name,
        "ready": model.ready,
        "predict": f"/v1/models/{served.name}/predict",
    }
    if about is not None:
        found |= {key: value for key, value in dataclasses.asdict(about).items() if key != "note"}
        if about.sample_rate:
            found["stream"] = f"/v1/models/{served.name}/stream"
        else:
            del found["sample_rate"], found["latency_ms"]
    return found


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    problem = error.problem
    if problem.log:
        log.error("%s %s %s: %s", request_id.get(), request.url.path, problem.message, problem.log)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return Response(
        error_body(problem, request_id.get()), problem.status, headers, media_type="application/json"
    )


async def _unknown(request: Request, error: Exception) -> Response:
    """Answer where there is no such address, or not this method."""
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, "no_address", str(error.detail)[:200])
    return Response(
        error_body(problem, request_id.get()), problem.status, error.headers, media_type="application/json"
    )


async def _left(request: Request, error: Exception) -> Response:
    """Answer a client that left: no one reads it, the log has the status."""
    return Response(status_code=499)
