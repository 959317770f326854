"""How a job is going: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

INTERVAL_S = 10.0  # between two lines where there is no terminal


def clock(seconds: float) -> str:
    """Return a duration as 3:07 or 1:02:03.

    Example:
        >>> clock(187)
        '3:07'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """A state in words: beside a bar on a terminal, a line now and then elsewhere.

    Args:
        total: The whole of what is done.
        quiet: Print nothing.
        stream: Where to print; the standard error by default.
    """

    def __init__(self, total: float, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._total, self._quiet, self._stream = total, quiet, stream or sys.stderr
        self._printed = time.monotonic()
        self._bar: Bar | None = None

    def start(self, opening: str, done: int, state: str) -> None:
        """Print what is to come, and show the bar on a terminal."""
        if self._quiet:
            return
        print(opening, file=self._stream, flush=True)
        if self._stream.isatty():
            from rich import progress
            from rich.console import Console

            columns = (progress.BarColumn(), progress.TextColumn("{task.description}"))
            self._bar = progress.Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task(state, total=self._total, completed=done)
            self._bar.start()

    def show(self, done: float, state: str) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=state)
        elif not self._quiet and now - self._printed >= INTERVAL_S:
            self._printed = now
            print(state, file=self._stream, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Count:
    """How many of a known number of things are done, at which rate, and the time left.

    Args:
        total: How many there are.
        what: What they are, in the plural.
        quiet: Print nothing.
        stream: Where to print; the standard error by default.
    """

    def __init__(self, total: int, what: str, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.done, self._total, self._what = 0, total, what
        self._display = Display(total, quiet, stream)
        self._start = time.monotonic()

    def __enter__(self) -> Count:
        self._display.start(f"{self._total} {self._what}", 0, self.describe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def advance(self, number: int) -> None:
        """Count some."""
        self.done += number
        self._display.show(self.done, self.describe())

    def describe(self) -> str:
        """Return the state in words."""
        elapsed = time.monotonic() - self._start
        left = clock(elapsed / self.done * (self._total - self.done)) if self.done else "?"
        rate = self.done / elapsed if elapsed else 0.0
        return f"{self.done}/{self._total} {self._what}, {rate:.1f} {self._what}/s, ETA {left}"


class Progress:
    """Shards done, records a second, bad records and the time left, of one run of a job.

    Args:
        total: Shards of the job.
        done: Shards that an earlier run finished.
        shard_size: Records of a shard, about.
        quiet: Print nothing.
        stream: Where to print; the standard error by default.
    """

    def __init__(
        self, total: int, done: int, shard_size: int, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.records = 0
        self.bad = 0
        self._total = total
        self._done = done
        self._before = done
        self._shard_size = shard_size
        self._in_shard = 0
        self._start = time.monotonic()
        self._display = Display(total, quiet, stream)

    def __enter__(self) -> Progress:
        before = f", {self._before} done before" if self._before else ""
        shards = f"{self._total} shard{'s' if self._total != 1 else ''}"
        self._display.start(f"{shards}{before}", self._done, self.describe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def advance(self, records: int, bad: int) -> None:
        """Count a batch."""
        self.records += records
        self.bad += bad
        self._in_shard += records
        self._display.show(self.position(), self.describe())

    def finish_shard(self) -> None:
        """Count a shard."""
        self._done += 1
        self._in_shard = 0
        self._display.show(self.position(), self.describe())

    def position(self) -> float:
        """Return the shards done, the one at work by its records."""
        return min(self._done + min(self._in_shard / self._shard_size, 1.0), float(self._total))

    def describe(self) -> str:
        """Return the state in words."""
        elapsed = time.monotonic() - self._start
        made = self.position() - self._before
        left = clock(elapsed / made * (self._total - self.position())) if made else "?"
        rate = self.records / elapsed if elapsed else 0.0
        shards = f"{self._done}/{self._total} shards"
        return f"{shards}, {self.records} records, {rate:.1f} records/s, {self.bad} bad, ETA {left}"
