"""A log of interactions and a table of items to batches of histories that are read as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from manyheads.core import datasets, hub
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import BatchLoader, share_of
from manyheads.recsys.drawing import Draw, Drawing, Drawn
from manyheads.recsys.item_table import ItemTable, read_items
from manyheads.recsys.logs import Columns, Rules
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.published import NAMES, read_titles
from manyheads.recsys.sequences import Cells, Sequences, starts_of, without_items
from manyheads.recsys.source import (
    Asked,
    Core,
    Loading,
    LogSource,
    Splitting,
    question_loader,
    unchanged,
)
from manyheads.recsys.splits import Part, Questions
from manyheads.recsys.text_preprocessing import TextCut, TextPreprocessing
from manyheads.recsys.texts import ItemTexts, TextTokens
from manyheads.recsys.vocabulary import Vocabulary

__all__ = ["Columns", "Core", "Drawing", "Loading", "Rules", "Splitting", "TextData", "Texts"]


@dataclass(frozen=True)
class Texts:
    """What items are as texts: of each its first attributes, of each of these the name and then the value.

    Args:
        item: The column of ids of the table of items.
        attributes: Its columns that are read, in this order; null for all others. An empty cell is left out.
        missing: Items of the log that the table has no text of are an "error", or left out ("leave_out").
        vocabulary: A pretrained vocabulary: a `tokenizer.json`, or a folder with that or with `vocab.json`
            and `merges.txt`; null finds one in the texts of the items that are trained on.
        vocab_size: Its tokens at most.
        max_attributes: Of an item.
        max_attribute_tokens: Of an attribute, its name among them.
        max_tokens: Of a history's text.
    """

    item: str = "item_id"
    attributes: list[str] | None = None
    missing: Literal["error", "leave_out"] = "error"
    vocabulary: str | None = None
    vocab_size: int = 8192
    max_attributes: int = 3
    max_attribute_tokens: int = 32
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if min(self.max_attributes, self.max_attribute_tokens, self.max_tokens - 1) < 1:
            raise UsageError("texts: an item has an attribute and a token at least, and a text two tokens")


_COLUMNS, _RULES, _CORE, _SPLITTING = Columns(), Rules(), Core(), Splitting()
_TEXTS, _DRAWING, _LOADING = Texts(), Drawing(), Loading(64)


class TextData(LightningDataModule):
    """Histories of users and texts of items: read, divided, drawn from.

    Items are numbered so that those held out from training come last.

    Args:
        dataset: `ml_100k`, `ml_1m`, `ml_latest_small`, or the path of a log (CSV, parquet, a folder of them).
        items: The path of a table of items (CSV, parquet): ids, and a column an attribute. Null for
            MovieLens, whose titles and genres are known.
        seed: Of what is drawn.
        columns: Of a log.
        rules: What is done with its bad rows.
        core: What is left out for having few events.
        splitting: What is held out of each history.
        texts: What items are as texts.
        drawing: What is trained on, and which items are not.
        loading: Batches.
        start: A model folder whose items keep their numbers, and texts their tokens; the model's start says
            it. One that was converted from published weights keeps neither: texts.vocabulary names its own.
    """

    def __init__(
        self,
        dataset: str = "ml_100k",
        items: str | None = None,
        seed: int = 0,
        columns: Columns = _COLUMNS,
        rules: Rules = _RULES,
        core: Core = _CORE,
        splitting: Splitting = _SPLITTING,
        texts: Texts = _TEXTS,
        drawing: Drawing = _DRAWING,
        loading: Loading = _LOADING,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.source = LogSource(dataset, columns, rules, core, splitting)
        self.items, self.seed, self.splitting = items, seed, splitting
        self.options, self.drawing, self.loading, self.start = texts, drawing, loading, start
        self._ready = False

    @property
    def path(self) -> Path:
        """The log; of MovieLens a copy with named columns, which is written to the cache."""
        return self.source.path

    @property
    def num_items(self) -> int:
        """Items that are trained on: the model's catalogue."""
        self.setup()
        return self._trained

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        self.setup()
        return len(self.kept.tokens)

    @property
    def max_items(self) -> int:
        """Items of a history."""
        return self.drawing.length

    @property
    def max_tokens(self) -> int:
        """Tokens of a text."""
        return self.options.max_tokens

    def setup(self, stage: str | None = None) -> None:
        """Read the log and the table, divide, and cut texts into tokens; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        before = self._before()
        known = before[0].item_ids.ids if before else []
        table, sequences = self._read_table(), self.source.sequences()
        kept = {*known, *table.items}
        bad = np.array([id not in kept for id in sequences.item_ids.ids])
        if bad.any() and self.options.missing == "error":
            raise DataError(
                f"{int(bad.sum())} items of the log have no text, such as "
                f"{sequences.item_ids.ids[int(bad.argmax())]!r} (`texts.missing: leave_out` leaves them out)"
            )
        sequences = self.source.thinned(without_items(sequences, bad))
        trained = self._choose(known, sequences.item_ids.ids)
        self._trained = len(trained)
        self.split = self.source.divide(sequences.numbered_by(Vocabulary(trained)))
        self.counts = self.split.counts()
        self.counts[self._trained :] = 0
        self.kept = self._cut(before and before[1], known, table)
        self._questions: dict[Part, Questions] = {}
        self._ready = True

    def _before(self) -> tuple[Preprocessing, TextPreprocessing] | None:
        """Return what the folder keeps that training starts from; None where it is a published model's.

        Raises:
            UsageError: It keeps no vocabulary, and none is named.
        """
        if self.start is None:
            return None
        found = hub.read_config(hub.find_folder(Path(self.start))).preprocessing
        if not found:
            if self.options.vocabulary is None:
                raise UsageError(f"{self.start} keeps no vocabulary: name its own with data.texts.vocabulary")
            return None
        kept = Preprocessing.from_json(found)
        return kept, TextPreprocessing.from_json(found, len(kept.item_ids))

    def _read_table(self) -> ItemTable:
        of = self.options
        if self.items is not None:
            return read_items(self.items, of.item, of.attributes)
        dataset = self.source.dataset
        if dataset not in NAMES:
            raise UsageError("data.items: name the table of items, with their texts")
        titles = read_titles(dataset, datasets.locate(dataset))
        names = tuple(of.attributes or next(iter(titles.values())))
        rows = {id: {name: film.get(name) or None for name in names} for id, film in titles.items()}
        return ItemTable(names, {id: row for id, row in rows.items() if any(row.values())})

    def _choose(self, known: Sequence[str], ids: Sequence[str]) -> list[str]:
        """Return the items to train on, those first that a model knows already; others are held out.

        Raises:
            UsageError: Some are to be held out, and none is new.
        """
        new = [id for id in ids if id not in set(known)]
        count = round(self.drawing.cold * len(ids))
        if count > len(new) or (self.drawing.cold and not count):
            raise UsageError(
                f"drawing.cold {self.drawing.cold:g} is {count} items, and {len(new)} can be held out"
            )
        out = set(np.random.default_rng(self.seed).permutation(len(new))[:count].tolist())
        return [*known, *(id for number, id in enumerate(new) if number not in out)]

    def _cut(
        self, before: TextPreprocessing | None, known: Sequence[str], table: ItemTable
    ) -> TextPreprocessing:
        """Return the vocabulary, and the texts of all items.

        Raises:
            DataError: An item that the folder knew has no text any more.
        """
        of, ids = self.options, self.split.sequences.item_ids.ids
        if before is not None:
            tokens = before.tokens
        elif of.vocabulary is not None:
            tokens = TextTokens.read(Path(of.vocabulary))
        else:
            tokens = TextTokens.train(table.select(ids[: self._trained]).texts(), of.vocab_size)
        cut = TextCut(
            of.item,
            table.attributes,
            of.max_attributes,
            of.max_attribute_tokens,
            self.max_items,
            of.max_tokens,
        )
        kept = TextPreprocessing(tokens, cut, None)
        if before is None or before.items is None:
            gone = [id for id in ids if id not in table.items]
            if gone:
                raise DataError(f"data.items has no text of {gone[0]!r}, which {self.start} knows")
            return TextPreprocessing(tokens, cut, kept.texts([table.items[id] for id in ids]))
        # What the table says of an item now counts; else the folder's own text of it.
        told = [number for number, id in enumerate(ids) if id in table.items]
        place = np.arange(len(ids))
        place[told] = len(known) + np.arange(len(told))
        joined = ItemTexts.join([before.items, kept.texts([table.items[ids[number]] for number in told])])
        return TextPreprocessing(tokens, cut, joined.select(torch.from_numpy(place)))

    @property
    def texts(self) -> ItemTexts:
        """Texts of all items, those held out last."""
        self.setup()
        assert self.kept.items is not None
        return self.kept.items

    @cached_property
    def training(self) -> Sequences:
        """What is trained on: the histories' first parts, without the items that are held out."""
        self.setup()
        whole, (first, end) = self.split.sequences, self.split.span("train")
        owners = whole.owners()
        places = np.arange(len(whole.items))
        good = (places >= first[owners]) & (places < end[owners]) & (whole.items < self._trained)
        counts = np.bincount(owners[good], minlength=len(whole))
        times = None if whole.times is None else whole.times[good]
        return Sequences(whole.items[good], starts_of(counts), times, whole.user_ids, whole.item_ids)

    def chances(self) -> NDArray[np.float64]:
        """Return how likely each item that is trained on is to be drawn."""
        of = self.training
        others = np.maximum(of.lengths - 1, 1)  # a user's first event is nobody's target
        shares = 1 / others[of.owners()]  # every user is drawn from as often
        shares[of.offsets[:-1][of.lengths > 0]] = 0
        found = np.bincount(of.items, shares, self.num_items)
        return np.maximum(found, found[found > 0].min()) / found.sum()

    def asked(self, part: Part) -> Questions:
        """Return what a part asks."""
        self.setup()
        if part not in self._questions:
            self._questions[part] = self.split.questions(part, self.splitting.target)
        return self._questions[part]

    def cold_questions(self) -> Questions:
        """Return every event of an item that was held out, asked for by the history before it."""
        self.setup()
        whole = self.split.sequences
        owners, places = whole.owners(), np.arange(len(whole.items))
        at = np.flatnonzero((whole.items >= self._trained) & (places > whole.offsets[owners]))
        targets = Cells(np.arange(len(at)), whole.items[at])
        return Questions(owners[at].astype(np.int64), whole.offsets[owners[at]], at, targets)

    def train_dataloader(self) -> BatchLoader[Drawn, Drawn]:
        """Return the events that are trained on, others each epoch."""
        draw = Draw(
            self.training,
            self.texts.lengths.numpy(),
            self.drawing,
            self.loading.batch_size,
            self.max_tokens,
            self.seed,
            share_of(self.trainer),
        )
        return BatchLoader(draw.schedule, draw, draw.make, unchanged, self.loading.workers)

    def val_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the validation questions."""
        return self.question_loader("val")

    def test_dataloader(self) -> BatchLoader[Asked, Asked]:
        """Return the test questions."""
        return self.question_loader("test")

    def question_loader(self, part: Part, alone: bool = False) -> BatchLoader[Asked, Asked]:
        """Return a part's questions: this process' share of them, or all."""
        questions = self.asked(part)
        return question_loader(self.split.sequences, questions, self.loading, None if alone else self.trainer)

    def cold_loader(self) -> BatchLoader[Asked, Asked]:
        """Return all questions about items that were held out."""
        return question_loader(self.split.sequences, self.cold_questions(), self.loading)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat other logs and items as these; plain JSON."""
        self.setup()
        sequences, count = self.split.sequences, self._trained
        trained = Vocabulary(sequences.item_ids.ids[:count])
        kept = Preprocessing(self.source.columns_of(sequences), trained, self.counts[:count])
        texts = TextPreprocessing(self.kept.tokens, self.kept.cut, self.texts.select(torch.arange(count)))
        return kept.to_json() | texts.to_json()
