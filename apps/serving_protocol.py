"""HTTP as uvicorn speaks it, with time limits that it lacks: for headers, and for a response to be taken."""

from __future__ import annotations

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # for all of a request's headers
WRITE_S = 60.0  # for a client to take what lies in front of it
HEADER_BYTES = 32 << 10


class Protocol(H11Protocol):
    """One connection."""

    _headers: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first headers are waited for."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; where they end within headers, the rest of these is waited for."""
        super().data_received(data)
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

    def _watch(self) -> None:
        """Wait for headers, if it is them that come next."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._headers is None:
            self._headers = self.loop.call_later(HEADERS_S, self._late)

    def _unwatch(self) -> None:
        if self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def _late(self) -> None:
        self._headers = None
        if cast(object, self.conn.their_state) is h11.IDLE:
            self.transport.abort()
