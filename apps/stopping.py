"""SIGTERM and SIGINT: noted when they come, acted on between two batches."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from manyheads.core.errors import ManyheadsError


class Stopped(ManyheadsError):
    """A signal stopped the work; the exit code is 128 + the signal's number."""

    def __init__(self, signum: int, advice: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{advice}")
        self.exit_code = 128 + signum


class Stopping:
    """While entered, a first SIGTERM or SIGINT is noted as `signum`; a second one ends the process."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.signum is not None:
            raise Stopped(self.signum)
