"""How a job is going: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

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
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar = None
        if self._quiet:
            return self
        before = f", {self._before} done before" if self._before else ""
        shards = f"{self._total} shard{'s' if self._total != 1 else ''}"
        print(f"{shards}{before}", file=self._stream, flush=True)
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task(self.describe(), total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, records: int, bad: int) -> None:
        """Count a batch."""
        self.records += records
        self.bad += bad
        self._in_shard += records
        self._show()

    def finish_shard(self) -> None:
        """Count a shard."""
        self._done += 1
        self._in_shard = 0
        self._show()

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

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.position(), description=self.describe())
        elif not self._quiet and now - self._printed >= INTERVAL_S:
            self._printed = now
            print(self.describe(), file=self._stream, flush=True)
