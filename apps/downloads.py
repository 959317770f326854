"""A bar for downloads: file, bytes, rate and time to go, on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Bar:
    """Shows what `manyheads.core.pull` reports; nothing where the standard error is no terminal.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.shown: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.shown = Progress(
                "{task.description}", BarColumn(), *columns, console=Console(stderr=True), transient=True
            )
        self.task: Any = None

    def __enter__(self) -> Bar:
        if self.shown:
            self.shown.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.shown.stop()

    def __call__(self, name: str, received: int, total: int) -> None:
        """Show how much has come."""
        if self.shown is None:
            return
        if self.task is None or self.shown.tasks[-1].total != total:
            self.task = self.shown.add_task(name, total=total, completed=received)
        self.shown.update(self.task, description=name, completed=received)
