"""Where histories come from: a log of one's own or a published one, thinned out, divided, and asked about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import BatchLoader, Indices, Job, Schedule, share_of
from manyheads.recsys.logs import Columns, Log, Rules, read_log
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.published import NAMES, read_published
from manyheads.recsys.retrieval import Pairs
from manyheads.recsys.sequences import Cells, Places, Sequences, cells, k_core, packed
from manyheads.recsys.splits import Questions, Split, by_ratio, by_time, leaks, leave_one_out

log = logging.getLogger(__name__)
B = TypeVar("B")


@dataclass(frozen=True)
class Core:
    """Users and items with few events are left out, again and again until none has fewer.

    Args:
        users: Events that a user must have.
        items: Events that an item must have.
    """

    users: int = 5
    items: int = 5


@dataclass(frozen=True)
class Splitting:
    """What is trained on, validated on and tested on.

    Args:
        kind: "leave_one_out" (the last event of each user, and the one before), "time" (two times, the same
            for all: only this keeps what others did later out of training) or "ratio" (of each history).
        val: The share that is validated on, of "time" and "ratio".
        test: The share that is tested on.
        target: What is asked of a user: the "next" event of the part alone, or "all" of them.
    """

    kind: Literal["leave_one_out", "time", "ratio"] = "leave_one_out"
    val: float = 0.1
    test: float = 0.1
    target: Literal["next", "all"] = "next"


@dataclass(frozen=True)
class Loading:
    """How batches are made.

    Args:
        batch_size: Windows a batch of training.
        eval_batch_size: Users a batch of validation and test.
        workers: Processes that make batches; 0 makes them in training's own.
    """

    batch_size: int = 128
    eval_batch_size: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.eval_batch_size) < 1 or self.workers < 0:
            raise UsageError("loading: batches have at least one sample, and workers are 0 or more")


@dataclass(frozen=True)
class LogSource:
    """A log, and what is made of it before training.

    Args:
        dataset: A name of `published.NAMES`, or the path of a log (CSV, parquet, a folder of them).
        columns: Of a log.
        rules: What is done with its bad rows.
        core: What is left out for having few events.
        splitting: What is held out.
    """

    dataset: str
    columns: Columns
    rules: Rules
    core: Core
    splitting: Splitting

    @property
    def path(self) -> Path:
        """The log; of MovieLens a copy with named columns, which is written to the cache."""
        if self.dataset not in NAMES:
            return Path(self.dataset)
        path = datasets.cache_folder() / "data" / "recsys" / f"{self.dataset}.parquet"
        if not path.is_file():
            write_log(self.read(), path)
        return path

    def read(self) -> Log:
        """Read the log.

        Raises:
            DataError: What is wrong with it.
        """
        if self.dataset in NAMES:
            return read_published(self.dataset, datasets.locate(self.dataset), self.rules)
        return read_log(self.dataset, self.columns, self.rules)

    def sequences(self) -> Sequences:
        """Read the log, and say what was found and left out.

        Raises:
            DataError: What is wrong with it.
        """
        found = self.read()
        log.info("%s: %s", self.dataset, found.summary)
        if found.summary.kept < found.summary.rows and self.rules.bad == "skip":
            log.warning("%s: rows are left out: %s", self.dataset, found.summary)
        return Sequences.of(found)

    def thinned(self, sequences: Sequences) -> Sequences:
        """Leave out users and items with few events.

        Raises:
            DataError: Nothing is left.
        """
        return k_core(sequences, self.core.users, self.core.items)[0]

    def divide(self, sequences: Sequences) -> Split:
        """Divide histories, and look whether a part knows of another.

        Raises:
            DataError: It does.
        """
        of = self.splitting
        if of.kind == "leave_one_out":
            split = leave_one_out(sequences)
        else:
            split = (by_time if of.kind == "time" else by_ratio)(sequences, of.val, of.test)
        leaking = leaks(split)
        if leaking.order or leaking.overlap:
            raise DataError(f"the split {split.kind} leaks: {leaking}")
        return split

    def columns_of(self, sequences: Sequences) -> Columns:
        """Return the columns of `path`."""
        if self.dataset not in NAMES:
            return self.columns
        return Columns(timestamp=None if sequences.times is None else "timestamp")


class Asked(NamedTuple):
    """A batch of questions.

    Args:
        histories: What these users chose before, as tokens.
        targets: What they chose then; rows count the batch's users.
        seen: What they had chosen already.
        questions: Their numbers.
    """

    histories: Packed
    targets: Pairs
    seen: Pairs
    questions: Tensor


class Ask:
    """Makes a batch of questions."""

    def __init__(self, sequences: Sequences, questions: Questions) -> None:
        self.sequences, self.questions = sequences, questions
        self._starts = np.searchsorted(questions.targets.rows, np.arange(len(questions.users) + 1))

    def __call__(self, indices: Indices) -> Asked:
        """Return the questions of these numbers."""
        of, items = self.questions, self.sequences.items
        first, end = of.first[indices], of.end[indices]
        targets = cells(of.targets.items, self._starts[indices], self._starts[indices + 1])
        return Asked(
            pack_windows(self.sequences, first, end),
            as_pairs(targets),
            as_pairs(cells(items, first, end)),
            torch.as_tensor(indices),
        )


def question_loader(
    sequences: Sequences, questions: Questions, loading: Loading, trainer: Trainer | None = None
) -> BatchLoader[Asked, Asked]:
    """Return batches of questions: a process' share of them, or, without a trainer, all."""
    schedule = Schedule(len(questions.users), loading.eval_batch_size, part=share_of(trainer))
    return BatchLoader(schedule, Plan(schedule), Ask(sequences, questions), unchanged, loading.workers)


class Plan:
    """The jobs of a schedule's epoch: the numbers of each batch."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, first: int) -> Iterator[Job]:
        """Yield them from a batch on."""
        return ((indices,) for indices in self.schedule.plan(first))


def pack_windows(sequences: Sequences, first: Places, end: Places) -> Packed:
    """Return windows as tokens, one behind the other."""
    items, starts = packed(sequences.items, first, end, FIRST)
    return Packed(torch.from_numpy(items).long(), torch.from_numpy(starts).int())


def as_pairs(found: Cells) -> Pairs:
    """Return ragged rows as tensors."""
    return Pairs(torch.from_numpy(found.rows), torch.from_numpy(found.items).long())


def write_log(found: Log, path: Path) -> None:
    """Write a log as a parquet file, with the columns' usual names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from manyheads.core import files

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "user_id": pa.DictionaryArray.from_arrays(found.users, found.user_ids.ids),
        "item_id": pa.DictionaryArray.from_arrays(found.items, found.item_ids.ids),
    }
    if found.times is not None:
        columns["timestamp"] = pa.array(found.times)
    written = files.temporary(path)
    pq.write_table(pa.table(columns), written)
    files.flush(written)
    files.commit(written, path)


def unchanged(made: B) -> B:
    """Accept what was made."""
    return made
