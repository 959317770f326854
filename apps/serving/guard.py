"""What stands in front of every address: who may ask, how large and how slow a request may be, and its id.

Plain ASGI around the application. Bodies are counted as they come, chunk by chunk, whatever a header says;
all bodies together have a budget, so that many large ones cannot fill the memory. A client that sends too
slowly is cut off; one that sends headers or reads too slowly is cut off by `protocol`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextvars
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyheads.apps.serving.metrics import Metrics
from manyheads.apps.serving.payload import Problem
from manyheads.apps.serving.queue import Refused

log = logging.getLogger("manyheads.serving")

OPEN = ("/livez", "/readyz")  # asked by what has no token
LINGER_S, LINGER_BYTES = 2.0, 16 << 20  # of an unwanted body: read on, or its sender misses the answer
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
PAGE = "/ui"  # the page's own scripts and styles run there; nothing of other hosts, and no page may frame it
PAGE_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:;"
    b" style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:;"
    b" font-src 'self' data:; connect-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'self'"
)

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


@dataclass(frozen=True)
class Rules:
    """What a client may do.

    Args:
        token: That it must show; None: no one must.
        hosts: Names of this server in `Host`; empty: any. Others are pages that lead a browser here.
        body: Bytes of a request, at most.
        budget: Bytes of all requests' bodies together.
        pause_s: Between two pieces of a body.
        body_s: For a whole body.
    """

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    body: int = 16 << 20
    budget: int = 512 << 20
    pause_s: float = 10
    body_s: float = 60


@dataclass
class Exchange:
    """One request and its response.

    Args:
        id: Of the request.
        scope: Of the request.
        received: Bytes of the body.
        whole: The body has ended.
        status: Of the response; 0 before it.
    """

    id: str
    scope: Scope
    begin: float = field(default_factory=time.perf_counter)
    received: int = 0
    whole: bool = False
    status: int = 0


def error_body(problem: Problem, id: str) -> bytes:
    """Return an error's body."""
    found: dict[str, Any] = {"code": problem.code, "message": problem.message, "request_id": id}
    if problem.details:
        found["details"] = list(problem.details)
    return json.dumps({"error": found}).encode()


class Guard:
    """The application with its guard.

    Args:
        app: What is guarded.
        rules: What clients may do.
        metrics: Where it counts.
        quiet: No line a request.
    """

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, quiet: bool = False) -> None:
        self.app, self.rules, self.metrics, self.quiet = app, rules, metrics, quiet
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, websocket or lifespan."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), scope)
        scope.setdefault("state", {})["exchange"] = exchange
        request_id.set(exchange.id)
        problem = self._refusal(scope)
        if scope["type"] == "websocket":
            if problem is not None:
                await send({"type": "websocket.close", "code": 1008, "reason": problem.message})
                return
            await self.app(scope, receive, send)
            return
        await self._http(exchange, problem, receive, send)

    async def _http(self, exchange: Exchange, problem: Problem | None, receive: Receive, send: Send) -> None:
        deadline = time.perf_counter() + self.rules.body_s

        async def counted() -> Message:
            if exchange.whole:
                return await receive()
            rest = min(self.rules.pause_s, deadline - time.perf_counter())
            try:
                message = await asyncio.wait_for(receive(), max(rest, 0))
            except TimeoutError:
                raise Refused(Problem(408, "slow", "the body came too slowly")) from None
            self._count(exchange, message)
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                _add_headers(message, exchange, unread=not exchange.whole and _has_body(exchange.scope))
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            linger = last and exchange.status >= 400 and not exchange.whole and _has_body(exchange.scope)
            await send({**message, "more_body": True} if linger else message)
            if linger:
                await self._drain(exchange, receive)
                await send({"type": "http.response.body", "body": b""})

        try:
            if problem is not None:
                await respond(sent, problem, exchange.id)
            else:
                await self.app(exchange.scope, counted, sent)
        except Refused as error:  # raised where no handler of the application is
            if not exchange.status:
                await respond(sent, error.problem, exchange.id)
        finally:
            self.held -= exchange.received
            self.metrics.held.set(self.held)
            self._log(exchange)

    def _count(self, exchange: Exchange, message: Message) -> None:
        """Count a piece of a body.

        Raises:
            Refused: The body is too large, or all of them are together.
        """
        if message["type"] != "http.request":
            exchange.whole = True  # the client left
            return
        size = len(message.get("body", b""))
        exchange.received += size
        self.held += size
        self.metrics.held.set(self.held)
        exchange.whole = not message.get("more_body", False)
        if exchange.received > self.rules.body:
            raise Refused(Problem(413, "too_large", f"a body has at most {self.rules.body:,} bytes"))
        if self.held > self.rules.budget:
            raise Refused(Problem(429, "busy", "too many large requests at once; try again later"), 1)

    async def _drain(self, exchange: Exchange, receive: Receive) -> None:
        """Read on for a moment what will not be used, so that the answer is not lost with the connection."""
        size, end = 0, time.perf_counter() + LINGER_S
        while not exchange.whole and size < LINGER_BYTES:
            try:
                message = await asyncio.wait_for(receive(), max(0, end - time.perf_counter()))
            except TimeoutError:
                return
            size += len(message.get("body", b""))
            exchange.whole = message["type"] != "http.request" or not message.get("more_body", False)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Say why a request is not served at all, from its headers alone."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _hostname(headers.get(b"host", ""))
        if self.rules.hosts and host not in self.rules.hosts:
            return Problem(421, "wrong_host", "this server is not known by that name")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != headers.get(b"host"):
            return Problem(403, "wrong_origin", "pages of other servers may not ask here")
        token = self.rules.token if scope["path"] not in OPEN else None
        if token is not None and not hmac.compare_digest(_shown(headers).encode(), token.encode()):
            return Problem(401, "no_token", "a valid token is needed: Authorization: Bearer TOKEN")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > self.rules.body:
            return Problem(413, "too_large", f"a body has at most {self.rules.body:,} bytes")
        return None

    def _log(self, exchange: Exchange) -> None:
        if self.quiet and exchange.status < 500:
            return
        scope = exchange.scope
        log.info(
            "%s %s %r %d %.0f ms %d bytes",
            exchange.id,
            scope["method"],
            scope["path"][:200],
            exchange.status or 499,
            1000 * (time.perf_counter() - exchange.begin),
            exchange.received,
        )


async def respond(send: Send, problem: Problem, id: str, retry_after: int | None = None) -> None:
    """Send an error."""
    body = error_body(problem, id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if problem.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="manyheads", charset="UTF-8"'))
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> str:
    """Return the client's id of a request if it is harmless, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]


def _hostname(host: str) -> str:
    """Return `Host` without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _shown(headers: MutableMapping[bytes, str]) -> str:
    """Return the token that a client shows: as a bearer's, or as a password, which browsers ask for."""
    scheme, _, value = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names or dict(scope["headers"]).get(b"content-length", b"0") != b"0"


def _add_headers(message: Message, exchange: Exchange, unread: bool) -> None:
    """Add the request's id and what protects browsers; a connection with an unread body is not used again."""
    there = {name.lower() for name, _ in message["headers"]}
    added = [(b"x-request-id", exchange.id.encode())]
    wanted = SECURITY
    if exchange.scope["path"].startswith(PAGE):
        wanted = SECURITY | {b"content-security-policy": PAGE_POLICY}
    added += [(name, value) for name, value in wanted.items() if name not in there]
    if unread:
        added.append((b"connection", b"close"))
    message["headers"] = [*message["headers"], *added]
