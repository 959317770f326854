"""A log of interactions to training, validation and test batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from manyheads.core import datasets, hub
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import BatchLoader, Indices, Job, Schedule, share_of
from manyheads.recsys.logs import Columns, Log, Rules, read_log
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.published import NAMES, read_published
from manyheads.recsys.retrieval import Pairs
from manyheads.recsys.sequences import Cells, Places, Sequences, Windows, cells, k_core, packed, windows
from manyheads.recsys.splits import Part, Questions, Split, by_ratio, by_time, leaks, leave_one_out

__all__ = ["Columns", "Core", "Cutting", "Loading", "RecommendationData", "Rules", "Splitting"]

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
class Cutting:
    """How training's histories are cut into windows, from their ends.

    Args:
        length: Events of a window, at most.
        step: From a window to the one before it, as a share of its length; 0 trains on the last alone.
    """

    length: int = 200
    step: float = 0.5

    def __post_init__(self) -> None:
        if self.length < 2 or not 0 <= self.step <= 1:
            raise UsageError("windows.length must be at least 2, and windows.step from 0 to 1")

    @property
    def events(self) -> int | None:
        """Events from a window to the one before it."""
        return max(1, int(self.step * self.length)) if self.step else None


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


_COLUMNS, _RULES, _CORE, _SPLITTING = Columns(), Rules(), Core(), Splitting()
_CUTTING, _LOADING = Cutting(), Loading()


class RecommendationData(LightningDataModule):
    """Histories of users: read, divided, cut into windows.

    Args:
        dataset: `ml_100k`, `ml_1m`, `ml_latest_small`, or the path of a log (CSV, parquet, a folder of them).
        seed: Of the order of windows.
        columns: Of a log.
        rules: What is done with its bad rows.
        core: What is left out for having few events.
        splitting: What is held out.
        windows: How training's histories are cut.
        loading: Batches.
        start: A model folder whose items keep their numbers; the model's start says it.
    """

    def __init__(
        self,
        dataset: str = "ml_100k",
        seed: int = 0,
        columns: Columns = _COLUMNS,
        rules: Rules = _RULES,
        core: Core = _CORE,
        splitting: Splitting = _SPLITTING,
        windows: Cutting = _CUTTING,
        loading: Loading = _LOADING,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.columns, self.rules = dataset, seed, columns, rules
        self.core, self.splitting, self.cutting, self.loading = core, splitting, windows, loading
        self.start = start
        self._ready = False

    @property
    def path(self) -> Path:
        """The log; of MovieLens a copy with named columns, which is written to the cache."""
        if self.dataset not in NAMES:
            return Path(self.dataset)
        path = datasets.cache_folder() / "data" / "recsys" / f"{self.dataset}.parquet"
        if not path.is_file():
            write_log(self._read(), path)
        return path

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        self.setup()
        return self.split.sequences.num_items

    @property
    def max_len(self) -> int:
        """Events of a window."""
        return self.cutting.length

    def setup(self, stage: str | None = None) -> None:
        """Read and divide the log; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        found = self._read()
        log.info("%s: %s", self.dataset, found.summary)
        if found.summary.kept < found.summary.rows and self.rules.bad == "skip":
            log.warning("%s: rows are left out: %s", self.dataset, found.summary)
        sequences, _ = k_core(Sequences.of(found), self.core.users, self.core.items)
        if self.start is not None:
            config = hub.read_config(hub.find_folder(Path(self.start)))
            sequences = sequences.numbered_by(Preprocessing.from_json(config.preprocessing).item_ids)
        self.split = self._divide(sequences)
        leaking = leaks(self.split)
        if leaking.order or leaking.overlap:
            raise DataError(f"the split {self.split.kind} leaks: {leaking}")
        self.counts = self.split.counts()
        self.windows: Windows = windows(*self.split.span("train"), self.cutting.length, self.cutting.events)
        self.questions: dict[Part, Questions] = {}
        self._ready = True

    def _read(self) -> Log:
        if self.dataset in NAMES:
            return read_published(self.dataset, datasets.locate(self.dataset), self.rules)
        return read_log(self.dataset, self.columns, self.rules)

    def _divide(self, sequences: Sequences) -> Split:
        of = self.splitting
        if of.kind == "leave_one_out":
            return leave_one_out(sequences)
        return (by_time if of.kind == "time" else by_ratio)(sequences, of.val, of.test)

    def asked(self, part: Part) -> Questions:
        """Return what a part asks."""
        self.setup()
        if part not in self.questions:
            self.questions[part] = self.split.questions(part, self.splitting.target)
        return self.questions[part]

    def train_dataloader(self) -> BatchLoader[Packed, Packed]:
        """Return the training windows, in another order each epoch."""
        self.setup()
        make = Cut(self.split.sequences, self.windows)
        schedule = Schedule(
            len(self.windows.users),
            self.loading.batch_size,
            shuffle=True,
            seed=self.seed,
            part=share_of(self.trainer),
        )
        return BatchLoader(schedule, _Plan(schedule), make, _same, self.loading.workers)

    def val_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the validation questions."""
        return self.question_loader("val")

    def test_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the test questions."""
        return self.question_loader("test")

    def question_loader(self, part: Part, alone: bool = False) -> BatchLoader[Asked, Asked]:
        """Return a part's questions: this process' share of them, or all."""
        questions = self.asked(part)
        share = (0, 1) if alone else share_of(self.trainer)
        if len(questions.users) % share[1]:
            raise UsageError(
                f"{len(questions.users)} users to {part} on cannot be shared by {share[1]} processes: use one"
            )
        schedule = Schedule(len(questions.users), self.loading.eval_batch_size, part=share)
        make = Ask(self.split.sequences, questions)
        return BatchLoader(schedule, _Plan(schedule), make, _same, self.loading.workers)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat another log as this one; plain JSON."""
        self.setup()
        columns = self.columns
        if self.dataset in NAMES:
            columns = Columns(timestamp=None if self.split.sequences.times is None else "timestamp")
        return Preprocessing(columns, self.split.sequences.item_ids, self.counts).to_json()


class _Plan:
    """The jobs of a schedule's epoch: the numbers of each batch."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, first: int) -> Iterator[Job]:
        return ((indices,) for indices in self.schedule.plan(first))


class Cut:
    """Makes a batch of training windows."""

    def __init__(self, sequences: Sequences, windows: Windows) -> None:
        self.sequences, self.windows = sequences, windows

    def __call__(self, indices: Indices) -> Packed:
        """Return the windows of these numbers."""
        return pack_windows(self.sequences, self.windows.first[indices], self.windows.end[indices])


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


def _same(made: B) -> B:
    return made
