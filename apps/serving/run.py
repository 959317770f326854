"""One run of the server: models loaded, requests answered, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from manyheads.apps.serving import Options, split
from manyheads.apps.serving.app import Service, make_app
from manyheads.apps.serving.guard import Guard, Rules
from manyheads.apps.serving.metrics import Metrics
from manyheads.apps.serving.payload import Limits, Served
from manyheads.apps.serving.process import Plan, Start, in_process
from manyheads.apps.serving.protocol import Protocol
from manyheads.apps.serving.queue import Model, Policy
from manyheads.apps.serving.streams import MOST_BYTES, Streams
from manyheads.core import catalog, hub
from manyheads.core.errors import UsageError

log = logging.getLogger("manyheads.serving")

GRACE_S = 5  # beyond the deadline, for what was admitted
POLL_S = 0.05
BACKLOG = 2048  # connections that wait to be taken
STUCK = 4  # deadlines that a batch may take before its worker is ended


def find(references: Sequence[str]) -> list[Served]:
    """Return the models of references.

    Raises:
        UsageError: There is no such model, or two of one name.
        ManyheadsError: A folder's config cannot be used.
    """
    found: dict[str, Served] = {}
    for given in references:
        name, reference = split(given)
        if name in found:
            raise UsageError(f"two models are called {name!r}: give one another name (name={reference})")
        folder = hub.find_folder(reference)
        config = hub.read_config(folder)
        task = catalog.find(config.name).task
        found[name] = Served(name, folder, config.domain, task, config.name)
    return list(found.values())


def make_service(options: Options, served: Sequence[Served], start: Start = in_process) -> Service:
    """Return the models, not yet started.

    Args:
        options: How they are served.
        served: Which.
        start: Makes workers.
    """
    metrics = Metrics()
    cpus = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    limits = Limits(options.max_seconds, options.max_pixels)
    policy = Policy(options.queue, options.wait_ms / 1000, options.deadline)
    threads = max(1, cpus // (len(served) * options.workers))
    models = {
        each.name: Model(
            Plan(
                each, limits, options.batch, options.device, threads, max(60, STUCK * options.deadline), start
            ),
            policy,
            metrics,
            options.workers,
        )
        for each in served
    }
    return Service(models, metrics, Streams(options.streams))


def make_guarded(options: Options, service: Service) -> Guard:
    """Return the application behind its guard, with the page where it is asked for.

    Raises:
        UsageError: There is no page in this version.
    """
    rules = Rules(options.token(), options.hosts, int(options.max_body_mb * (1 << 20)))
    app, guard = make_app(service, rules, options.quiet)
    if options.ui:
        try:
            page = importlib.import_module("manyheads.apps.serving.page")
        except ModuleNotFoundError as error:
            raise UsageError(f"--ui is not to be had here ({error.name} is missing)") from error
        page.mount(app, service)
    return guard


def run(options: Options) -> int:
    """Serve until a signal comes.

    Returns:
        0 if all that was admitted was finished, else 128 and the signal's number.

    Raises:
        UsageError: A model is not there, or the port is taken.
        ManyheadsError: A model cannot be loaded.
    """
    served = find(options.models)
    service = make_service(options, served)
    guard = make_guarded(options, service)
    _log_to_stderr()
    with contextlib.closing(bind(options.host, options.port)) as listening:
        return asyncio.run(Run(options, service, guard, listening).serve())


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens: who connects early waits until requests are taken.

    Raises:
        UsageError: It is taken, or there is no such address.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        hint = ": choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise UsageError(f"cannot listen at {host}:{port} ({error.strerror}){hint}") from error
    return found


class Server(uvicorn.Server):
    """uvicorn without hands of its own on signals: `Run` drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


@dataclass
class Run:
    """A server that runs.

    Args:
        options: How.
        service: What is served.
        guard: The application.
        listening: The socket.
    """

    options: Options
    service: Service
    guard: Guard
    listening: socket.socket
    signum: int = 0
    forced: bool = False
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> int:
        """Serve until a signal comes; return the exit code.

        Raises:
            ManyheadsError: A model cannot be loaded.
        """
        begin = time.perf_counter()
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self.stop, signum)
        server = Server(self._config())
        serving = asyncio.create_task(server.serve(sockets=[self.listening]))
        stopping = asyncio.create_task(self._stop.wait())
        models = list(self.service.models.values())
        loading = asyncio.ensure_future(asyncio.gather(*(model.start() for model in models)))
        try:
            first: list[asyncio.Future[Any]] = [loading, stopping, serving]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._say_ready(time.perf_counter() - begin)
                await asyncio.wait(first[1:], return_when=asyncio.FIRST_COMPLETED)
            finished = await self._drain()
            return 0 if finished else 128 + self.signum
        finally:
            loading.cancel()
            stopping.cancel()
            server.should_exit = True
            server.force_exit = self.forced
            await asyncio.gather(serving, loading, stopping, return_exceptions=True)
            await asyncio.gather(*(model.close() for model in models), return_exceptions=True)

    def _config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.guard,
            http=Protocol,
            lifespan="on",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=GRACE_S,
            ws_max_size=MOST_BYTES,
            ws_max_queue=4,
            ws_per_message_deflate=False,  # a small message could become a large one
        )

    def stop(self, signum: int) -> None:
        """Begin the end, as a signal does; called again, end at once."""
        if self.signum:
            self.forced = True
        self.signum = self.signum or signum
        self.service.draining = True
        self._stop.set()

    async def _drain(self) -> bool:
        """Wait until what was admitted is finished; return whether it is."""
        if self.service.active:
            log.info("finishing %d requests; new ones get 503", self.service.active)
        end = time.perf_counter() + self.options.deadline + GRACE_S
        while self.service.active and not self.forced and time.perf_counter() < end:
            await asyncio.sleep(POLL_S)
        return not self.service.active

    def _say_ready(self, seconds: float) -> None:
        """Say that all models answer, and where."""
        host, port = self.listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        warm = sum(model.about.warm_up_s for model in self.service.models.values() if model.about)
        print(f"ready in {seconds:.1f} s (warm-up {warm:.1f} s)  {address}/", flush=True)
        for model in self.service.models.values():
            about, of = model.about, model.plan.model
            if about is None:
                continue
            note = f"  (not tried out: {about.note})" if about.note else ""
            stream = f"  stream /v1/models/{of.name}/stream" if about.sample_rate else ""
            print(
                f"  {of.name}: {of.domain} {of.task}, {of.catalog_name} on {about.device}"
                f"  POST /v1/models/{of.name}/predict{stream}{note}",
                flush=True,
            )
        page = "  page /ui" if self.options.ui else ""
        print(f"  api /openapi.json  metrics /metrics  health /livez /readyz{page}", flush=True)
        if self.options.host not in ("127.0.0.1", "localhost", "::1") and self.options.token_file is None:
            print("  anyone who reaches this address may ask: --token-file asks for a token", flush=True)


def _log_to_stderr() -> None:
    """Log requests and what goes wrong, a line each, on the standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a line for each broken request else
