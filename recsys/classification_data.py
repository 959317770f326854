"""A table of texts, customers' variables and labels to training, validation and test batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.loading import BatchLoader, Indices, Job, Schedule, share_of
from manyheads.recsys.customers import Customers, Fields, Hidden, Inputs, TextLimits, labels_of, text_of
from manyheads.recsys.label_table import LabelTable, learn
from manyheads.recsys.published import write_opinions
from manyheads.recsys.texts import ItemTexts

log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
PUBLISHED = ("ml_100k",)
BLOCK = 1 << 14  # rows whose texts are cut at once


@dataclass(frozen=True)
class Dividing:
    """What is trained on, validated on and tested on.

    Args:
        val: The share that is validated on, drawn by the seed.
        test: The share that is tested on.
        group: A column: rows with the same value, such as a customer's, are all in one part.
        column: A column that says "train", "val" or "test" of each row, instead of all this.
    """

    val: float = 0.1
    test: float = 0.1
    group: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise UsageError("dividing.val and dividing.test must be above 0, and together below 1")
        if self.group is not None and self.column is not None:
            raise UsageError("dividing.group and dividing.column: only one of them divides the rows")


@dataclass(frozen=True)
class Batches:
    """How batches are made.

    Args:
        batch_size: Rows a batch of training.
        eval_batch_size: Rows a batch of validation and test.
        workers: Processes that make batches; 0 makes them in training's own.
    """

    batch_size: int = 64
    eval_batch_size: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.eval_batch_size) < 1 or self.workers < 0:
            raise UsageError("loading: batches have at least one row, and workers are 0 or more")


class Labelled(NamedTuple):
    """A batch of rows with their labels.

    Shape:
        target `[B]` int64, or `[B, labels]` of 0 and 1.
    """

    inputs: Inputs
    target: Tensor


_FIELDS = Fields(["title", "genres"], ["age"], ["gender", "occupation"], "liked")
_DIVIDING, _LIMITS, _LOADING = Dividing(), TextLimits(), Batches()


class TextData(LightningDataModule):
    """Rows of texts, variables and labels: read, divided, made into tokens and numbers.

    Vocabulary, means, categories and classes are those of the training rows.

    Args:
        dataset: `ml_100k` (`published.write_opinions` says what of it), or the path of a CSV or parquet file.
        seed: Of the parts and of the order of rows.
        fields: What the columns are.
        dividing: The parts.
        limits: How texts are cut.
        loading: Batches.
        unlabelled: Rows without a label are an "error", or left out ("skip"); where a row may have several
            labels, it may have none, too.
        hidden: What the model is not shown, the "texts" or the "variables": it says what these are worth.
    """

    def __init__(
        self,
        dataset: str = "ml_100k",
        seed: int = 0,
        fields: Fields = _FIELDS,
        dividing: Dividing = _DIVIDING,
        limits: TextLimits = _LIMITS,
        loading: Batches = _LOADING,
        unlabelled: Literal["error", "skip"] = "error",
        hidden: Hidden = "none",
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.fields, self.dividing = dataset, seed, fields, dividing
        self.limits, self.loading, self.unlabelled, self.hidden = limits, loading, unlabelled, hidden
        self._ready = False

    @property
    def path(self) -> Path:
        """The table; of a published data set one that is written to the cache."""
        if self.dataset not in PUBLISHED:
            return Path(self.dataset)
        path = datasets.cache_folder() / "data" / "recsys" / f"{self.dataset}_opinions.parquet"
        if not path.is_file():
            write_opinions(datasets.locate(self.dataset), path)
        return path

    @property
    def model_inputs(self) -> dict[str, int | list[int]]:
        """What of the model the data decide."""
        self.setup()
        return self.customers.model_inputs()

    @property
    def several(self) -> bool:
        """Whether a row can have several labels."""
        return bool(self.fields.separator)

    @property
    def class_counts(self) -> list[int]:
        """Training rows of each class, and behind them how many rows there are."""
        self.setup()
        return self._counts

    @property
    def labels(self) -> Sequence[str]:
        """The classes."""
        self.setup()
        return self.customers.labels

    def setup(self, stage: str | None = None) -> None:
        """Read, check and divide; once, whatever the stage.

        Raises:
            DataError: What is wrong with the table.
        """
        if self._ready:
            return
        table = LabelTable.read(self.path, self._wanted())
        labels = [labels_of(cell, self.fields.separator) for cell in table.column(self.fields.label)]
        table, labels = self._labelled(table, labels)
        self.rows = self._divide(table)
        train = self.rows["train"].tolist()
        self.customers = learn(table, labels, train, self.fields, self.limits, self.hidden)
        self.target = self._targets(table, labels)
        self._counts = self._count(self.target[self.rows["train"]])
        self._encode(table)
        sizes = ", ".join(f"{part} {len(rows):,}" for part, rows in self.rows.items())
        log.info("%s: rows %s; %d classes", self.dataset, sizes, len(self.customers.labels))
        self._ready = True

    def _wanted(self) -> list[str]:
        more = [self.dividing.group, self.dividing.column]
        wanted = [*self.fields.inputs, self.fields.label, *(name for name in more if name is not None)]
        return list(dict.fromkeys(wanted))

    def _labelled(self, table: LabelTable, labels: list[list[str]]) -> tuple[LabelTable, list[list[str]]]:
        """Leave out rows without a label, or refuse them."""
        none = [] if self.several else [row for row, each in enumerate(labels) if not each]
        if not none:
            return table, labels
        if self.unlabelled == "error":
            column = self.fields.label
            raise DataError(
                f"{table.where(none[0])}: nothing in the label column {column!r} "
                f"({len(none):,} such rows; unlabelled: skip leaves them out)"
            )
        log.warning("%s: %d rows without a label are left out", table.source, len(none))
        gone = set(none)
        kept = [row for row in range(len(labels)) if row not in gone]
        return table.take(kept), [labels[row] for row in kept]

    def _divide(self, table: LabelTable) -> dict[Part, NDArray[np.int64]]:
        of = self.dividing
        if of.column is not None:
            words = [text_of(cell) for cell in table.column(of.column)]
            for row, word in enumerate(words):
                if word not in PARTS:
                    close = did_you_mean(str(word), PARTS)
                    raise DataError(
                        f"{table.where(row)}: {of.column} is {word!r}, not train, val or test{close}"
                    )
            found = {
                part: np.array([row for row, word in enumerate(words) if word == part]) for part in PARTS
            }
        else:
            names = range(len(table)) if of.group is None else map(text_of, table.column(of.group))
            numbers: dict[object, int] = {}
            groups = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
            order = np.random.default_rng([self.seed, 1]).permutation(len(numbers))
            val, test = (round(share * len(numbers)) for share in (of.val, of.test))
            part_of = np.zeros(len(numbers), np.int8)
            part_of[order[:val]], part_of[order[val : val + test]] = 1, 2
            found = {part: np.flatnonzero(part_of[groups] == number) for number, part in enumerate(PARTS)}
        for part, rows in found.items():
            if not len(rows):
                raise DataError(f"{table.source}: no row is left for the part {part!r}")
        return found

    def _targets(self, table: LabelTable, labels: list[list[str]]) -> Tensor:
        """Return the classes' numbers, or 0 and 1 of each label."""
        known = {label: number for number, label in enumerate(self.customers.labels)}
        for row, each in enumerate(labels):
            if unknown := next((label for label in each if label not in known), None):
                raise DataError(f"{table.where(row)}: no training row has the label {unknown!r}")
        if not self.several:
            return torch.tensor([known[each[0]] for each in labels])
        found = torch.zeros(len(labels), len(known))
        for row, each in enumerate(labels):
            found[row, [known[label] for label in each]] = 1.0
        return found

    def _count(self, target: Tensor) -> list[int]:
        count = len(self.customers.labels)
        each = target.sum(0).long() if self.several else torch.bincount(target, minlength=count)
        return [*each.tolist(), len(target)]

    def _encode(self, table: LabelTable) -> None:
        """Keep the rows as tokens and numbers."""
        parts, numbers, kinds = [], [], []
        for first in range(0, len(table), BLOCK):
            samples = []
            for row, cells in enumerate(table.rows(first, first + BLOCK), first):
                try:
                    samples.append(self.customers.sample(cells))
                except BadRecord as error:
                    raise DataError(f"{table.where(row)}: {error}") from None
            parts.append(self.customers.cut([sample.texts for sample in samples]))
            numbers += [sample.numbers for sample in samples]
            kinds += [sample.kinds for sample in samples]
        self.items = ItemTexts.join(parts)
        self.numbers = torch.tensor(numbers, dtype=torch.float32).view(len(table), -1)
        self.kinds = torch.tensor(kinds, dtype=torch.int64).view(len(table), -1)

    def _loader(self, part: Part) -> BatchLoader[Labelled, Labelled]:
        self.setup()
        train = part == "train"
        size = self.loading.batch_size if train else self.loading.eval_batch_size
        rows = self.rows[part]
        schedule = Schedule(len(rows), size, shuffle=train, seed=self.seed, part=share_of(self.trainer))
        make = Make(self.customers, self.items, self.numbers, self.kinds, self.target, rows)
        return BatchLoader(schedule, _Plan(schedule), make, _same, self.loading.workers)

    def train_dataloader(self) -> BatchLoader[Labelled, Labelled]:
        """Return the training batches, in another order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader[Labelled, Labelled]:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader[Labelled, Labelled]:
        """Return the test batches."""
        return self._loader("test")

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat another table as this one; plain JSON."""
        self.setup()
        return self.customers.to_json()


class Make:
    """Makes a batch of rows."""

    def __init__(
        self,
        customers: Customers,
        items: ItemTexts,
        numbers: Tensor,
        kinds: Tensor,
        target: Tensor,
        rows: NDArray[np.int64],
    ) -> None:
        self.customers, self.items, self.rows = customers, items, rows
        self.numbers, self.kinds, self.target = numbers, kinds, target

    def __call__(self, indices: Indices) -> Labelled:
        """Return the rows of these numbers."""
        of = torch.from_numpy(self.rows[indices])
        texts = self.customers.read(self.items, of)
        return Labelled(Inputs(texts, self.numbers[of], self.kinds[of]), self.target[of])


class _Plan:
    """The jobs of a schedule's epoch: the numbers of each batch."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, first: int) -> Iterator[Job]:
        return ((indices,) for indices in self.schedule.plan(first))


def _same(made: Labelled) -> Labelled:
    return made
