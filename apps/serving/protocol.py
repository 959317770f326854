"""HTTP as uvicorn speaks it, with limits that it lacks: of headers and their time, and of a slow reader's."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 10.0  # for all of a request's headers
WRITE_S = 60.0  # for a client to take what lies in front of it
HEADER_BYTES = 32 << 10  # of a request's line, headers and trailers


class Protocol(HttpToolsProtocol):
    """One connection."""

    _late: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _begun = False  # headers have begun and not ended
    _size = 0  # bytes that came within them so far
    _kept = 0  # bytes of headers that are kept
    _given_away = False  # to the protocol of websockets

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first headers are waited for."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; where they end within headers, the rest of these is waited for."""
        before = self._begun
        super().data_received(data)
        self._size = self._size + len(data) if before and self._begun else 0
        if self._size > HEADER_BYTES:
            self.transport.abort()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._unwatch()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client takes less than there is: it gets a while."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It took most of it."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._begun, self._kept = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address."""
        self._keep(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._keep(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are all there."""
        self._begun = False
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        """Give the connection to the protocol of websockets."""
        self._given_away = True
        super().handle_websocket_upgrade()

    def _keep(self, size: int) -> None:
        """Count bytes; what is raised here becomes a 400 and the connection's end."""
        self._kept += size
        if self._kept > HEADER_BYTES:
            raise ValueError("the headers are too large")

    def _watch(self) -> None:
        """Wait for headers, if it is them that come next."""
        idle = self.cycle is None or (self.cycle.response_complete and self.timeout_keep_alive_task is None)
        if self._given_away or not (self._begun or idle):
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._end_late)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end_late(self) -> None:
        self._late = None
        self.transport.abort()
