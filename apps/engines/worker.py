"""A worker of an engine: it loads the model once and runs shards, in whatever process it lives."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from manyheads.apps.parts import Done, OnBatch, Task, run_shard
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.predictor import AnyPredictor, configure

if TYPE_CHECKING:
    from manyheads.apps.staging import Staged


@dataclass(frozen=True)
class Site:
    """What a worker must find where it runs, on whatever machine that is.

    Args:
        address: Of the cluster, as the user gave it.
        folder: The runner's working folder: paths are relative to it.
        source: What the job's predictor reads.
        staged: Inputs that every machine copies for itself.
        sample: Some files of the inputs, with their sizes.
        software: Versions that the job's bytes depend on.
        quiet: Say nothing.
    """

    address: str | None
    folder: str
    source: str | list[str]
    staged: Staged | None
    sample: tuple[tuple[str, int], ...]
    software: Mapping[str, str]
    quiet: bool = False

    def check(self) -> None:
        """Compare what is here with what the runner has.

        Raises:
            UsageError: Another version of what the bytes depend on, or an input is not here.
        """
        from manyheads.apps.jobfolder import software

        for name, here in software().items():
            if here != self.software[name]:
                raise UsageError(f"{name} {here} is installed here, the job runs with {self.software[name]}")
        if self.staged is not None:
            self.staged.fetch()
        for path, size in self.sample:
            if self.staged is not None and self.staged.has(path):
                continue
            if not os.path.isfile(path) or os.stat(path).st_size != size:
                raise UsageError(
                    f"the input {path} is not here as it is where the job was started:"
                    " inputs must lie on a file system that all nodes share"
                )

    def prepare(self, predictor: AnyPredictor) -> None:
        """Copy what the job's tables name."""
        if self.staged is not None and hasattr(predictor, "named_files"):
            self.staged.fetch_named(predictor.named_files(self.source))


class Worker:
    """Runs shards of a job.

    Args:
        task: What the shards share.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.predictor: AnyPredictor | None = None

    def load(self) -> AnyPredictor:
        """Return the job's predictor.

        Raises:
            ManyheadsError: The model is another than the job's.
        """
        if self.predictor is None:
            loaded, identity = self.task.load(self.task.model)
            if identity != self.task.identity:
                raise ManyheadsError(f"the model {self.task.model} was replaced while the job ran")
            self.predictor = configure(loaded, self.task.settings)
        return self.predictor

    def run(self, index: int, shard: object, on_batch: OnBatch, starting: float = 0.0) -> Done:
        """Run a shard."""
        predictor = self.load()
        with threads(self.task.threads):
            return replace(run_shard(predictor, self.task, index, shard, on_batch), starting=starting)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's threads, if the predictor brought torch in."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
