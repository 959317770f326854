"""A log of interactions in, the best items for each user out: what batch jobs and serving see. No lightning.

A user's history is all that the log says of it. The log is held as numbers, 16 bytes a row; scores of users
and items are never held but a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.core.predictor import Row
from manyheads.recsys.logs import Numbers, Rules, read_log
from manyheads.recsys.models.bert4rec import BERT4Rec
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of
from manyheads.recsys.models.recformer import Recformer
from manyheads.recsys.models.sasrec import SASRec
from manyheads.recsys.popularity import popularity
from manyheads.recsys.preprocessing import Preprocessing
from manyheads.recsys.retrieval import NONE, Pairs, Top, allowed_items, top_k
from manyheads.recsys.scorers import ByNumber, ByText, Scorer
from manyheads.recsys.search import Approximate, Search
from manyheads.recsys.sequences import Sequences
from manyheads.recsys.tables import Source, list_files
from manyheads.recsys.text_preprocessing import TextPreprocessing

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.core.hub import ModelConfig

CHOICES = {
    "seen": ("leave_out", "keep"),
    "unknown": ("error", "popular", "skip"),
    "bad_rows": ("error", "skip"),
    "search": ("exact", "faiss"),
}
MOST = 1000  # items a user
Files: TypeAlias = list[tuple[str, int, int]]


@dataclass(frozen=True)
class Options:
    """What is recommended, and to whom.

    Args:
        top_k: Items a user; a user has fewer where no more are left.
        seen: Whether items of the user's history are left out ("leave_out") or recommended again ("keep").
        allow: A text file with an item a line: only these are recommended. Empty for all.
        deny: A text file with an item a line: none of these is. Ids that the model does not know are passed
            over in both.
        items: Of a model of texts: a table of items (CSV, parquet). Those that the model does not know are
            recommended by their texts, and read in histories. Empty for none.
        unknown: What is done with a user in whose history the model knows no item: an "error" (a bad record),
            what is "popular" (its score is the share of training's events), or no rows ("skip").
        bad_rows: A row of the log without user, item or time is an "error", or left out ("skip").
        search: "exact", all items for each user; or "faiss", some lists of a large catalogue. It is refused
            where it finds too little of the exact answer for 256 users of the first log, or all if it has
            fewer.
        probes: Lists that faiss searches for a user.
        min_recall: What it must find of the exact answer at least, in percent.

    Raises:
        UsageError: A value is none of these, or out of range.
    """

    top_k: int = 10
    seen: str = "leave_out"
    allow: str = ""
    deny: str = ""
    items: str = ""
    unknown: str = "error"
    bad_rows: str = "error"
    search: str = "exact"
    probes: int = 64
    min_recall: int = 95

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                option = f"--{name.replace('_', '-')}"
                close = did_you_mean(str(value), known)
                raise UsageError(f"{option} {value}: it takes {', '.join(known)}{close}")
        if not 1 <= self.top_k <= MOST:
            raise UsageError(f"--top-k takes 1 to {MOST}, not {self.top_k}")
        if self.probes < 1 or not 0 <= self.min_recall <= 100:
            raise UsageError("--probes takes 1 or more, and --min-recall a percentage")


@dataclass(frozen=True)
class Shard:
    """Some users of a source, from the first to before the last."""

    source: Source
    first: int
    end: int


class Held(NamedTuple):
    """A source that was read, its files as they were, and what stands in it."""

    source: Source
    files: Files | None
    sequences: Sequences


@dataclass(frozen=True)
class Record:
    """A user, and the items of its history that the model knows, in order."""

    id: str
    items: Numbers


class Batch(NamedTuple):
    """Histories of a batch.

    Args:
        histories: Those that the model answers, as tokens.
        seen: Items that they have.
        by_model: Their places in the batch.
        popular: Places of those that get what is popular.
        size: Records of the batch.
    """

    histories: Packed
    seen: Pairs
    by_model: Tensor
    popular: Tensor
    size: int


class Predictor:
    """Recommends items to users.

    A source is a log (CSV, parquet, a folder of them, several, or a DataFrame) with training's columns.
    A user's row is of an item that it has not chosen yet, `rank` 1 being the best; of equal scores the item
    comes first that training knew first.

    Args:
        model: A BERT4Rec, a SASRec, or, with texts, a Recformer.
        preprocessing: Of its folder.
        options: What is recommended.
        texts: Of its folder, where the model reads items.

    Raises:
        DataError: The table of items cannot be used.
        UsageError: There is no such table, or the model reads none.
    """

    batch_size = 256
    shard_size = 8192
    columns: Mapping[str, str] = {
        "user_id": "string",
        "rank": "int32",
        "item_id": "string",
        "score": "float32",
    }

    def __init__(
        self,
        model: BERT4Rec | SASRec | Recformer,
        preprocessing: Preprocessing,
        options: Options | None = None,
        texts: TextPreprocessing | None = None,
    ) -> None:
        self.model, self.preprocessing, self.texts = model.eval(), preprocessing, texts
        self.options = Options() if options is None else options
        self.scorer = self._scorer()
        self.ids = self.scorer.ids
        self._held: Held | None = None
        if self.options.search == "faiss":
            self.finish = self._finish  # jobs look for it: exact searches have nothing to tell

    @classmethod
    def from_folder(cls, model: nn.Module, config: ModelConfig) -> Predictor:
        """Build the predictor of a model folder.

        Raises:
            DataError: The folder's preprocessing does not fit the model.
        """
        preprocessing = Preprocessing.from_json(config.preprocessing)
        if not isinstance(model, BERT4Rec | SASRec | Recformer):
            raise DataError(f"{config.name} is no recommender of histories")
        known, texts = len(preprocessing.item_ids), None
        if known != model.num_items:
            raise DataError(f"the model folder lists {known} items, its model has {model.num_items}")
        if isinstance(model, Recformer):
            texts = TextPreprocessing.from_json(config.preprocessing, known)
            texts.check(model.longformer.sizes)
        return cls(model, preprocessing, texts=texts)

    def _scorer(self) -> Scorer:
        known, path = self.preprocessing.item_ids, self.options.items
        if isinstance(self.model, Recformer):
            assert self.texts is not None
            return ByText(self.model, known, self.texts, path)
        if path:
            raise UsageError("--items is for models that read texts")
        return ByNumber(self.model, known)

    @property
    def settings(self) -> dict[str, str | int]:
        """The options by name."""
        found = dict(vars(self.options))
        if self.texts is None:
            del found["items"]
        return found

    def configure(self, settings: core.Settings) -> Predictor:
        """Return this model's predictor with other options.

        Raises:
            UsageError: One has no such value, or a list of items cannot be read.
        """
        found = Predictor(
            self.model,
            self.preprocessing,
            replace(self.options, **cast(dict[str, Any], dict(settings))),
            self.texts,
        )
        _ = found.search  # says what is wrong with the lists
        return found

    @cached_property
    def allowed(self) -> Tensor | None:
        """Items that may be recommended; None for all."""
        lists = [self._listed(path) if path else None for path in (self.options.allow, self.options.deny)]
        return allowed_items(len(self.ids), *lists)

    @cached_property
    def search(self) -> Search:
        """How the best items are found."""
        of = self.options
        faiss = Approximate(of.probes, of.min_recall) if of.search == "faiss" else None
        return Search(self.scorer, of.top_k, self.allowed, faiss)

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        """How often each item was chosen in training, a new one never."""
        counts = self.preprocessing.counts
        return np.pad(counts, (0, len(self.ids) - len(counts)))

    def _listed(self, path: str) -> Tensor:
        """Return the numbers of a file's items."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the list of items {path} cannot be read ({error})") from error
        numbers = self.ids.numbers([line.strip() for line in lines if line.strip()])
        return torch.from_numpy(numbers[numbers >= 0])

    def predict(self, source: core.Source, **settings: str | int) -> pd.DataFrame:
        """Predict a whole source in memory; arguments as `Options`.

        Raises:
            DataError: What is wrong with the source or a user.
            UsageError: An option has no such value, or there is none of this name.

        Example:
            >>> manyheads.load("runs/bert4rec_ml_100k/model").predict("log.csv", top_k=20)
        """
        return core.predict(core.configure(self, settings), source)

    def shards(self, source: core.Source, size: int) -> list[Shard]:
        """Cut a source into shards of `size` users, in the order in which they first come.

        Raises:
            DataError: The log cannot be used.
            UsageError: There is no such source.
        """
        self.scorer.check()
        users, source = len(self._sequences(cast(Source, source))), cast(Source, source)
        return [Shard(source, first, min(first + size, users)) for first in range(0, users, size)]

    def named_files(self, source: core.Source) -> Iterator[str]:
        """Yield the lists and the table of items: rows depend on what they say."""
        of = self.options
        return iter([path for path in (of.allow, of.deny, of.items) if path])

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield a shard's users."""
        found = self._sequences(shard.source)
        for user in range(shard.first, shard.end):
            items = found.history(user)
            yield Record(found.user_ids.ids[user], items[items >= 0])

    def count(self, shard: Shard) -> int:
        """Return how many users a shard has."""
        return shard.end - shard.first

    def _sequences(self, source: Source) -> Sequences:
        """Return the histories of a source: the last one read is held."""
        files = _state_of(source)
        held = self._held
        if held is None or held.files != files or (files is None and held.source is not source):
            rules = Rules("skip" if self.options.bad_rows == "skip" else "error")
            log = read_log(source, self.preprocessing.columns, rules, self.ids, grow=False)
            self._held = held = Held(source, files, Sequences.of(log))
        return held.sequences

    def prepare(self, record: Record) -> Record:
        """Return the record: what is wrong with a row was seen when the log was read.

        Raises:
            BadRecord: The model knows no item of the history, and that is an error.
        """
        if not len(record.items) and self.options.unknown == "error":
            raise BadRecord("no item of the history is known (--unknown popular or skip does without)")
        return record

    def collate(self, samples: Sequence[Record]) -> Batch:
        """Put histories one behind the other."""
        sizes = torch.tensor([len(sample.items) for sample in samples])
        known = [sample.items for sample in samples if len(sample.items)]
        items = torch.from_numpy(np.concatenate([*known, np.zeros(0, np.int32)])).long()
        by_model = sizes.nonzero().squeeze(1)
        starts = starts_of(sizes[by_model])
        histories = Packed(items + FIRST, starts)
        popular = (sizes == 0).nonzero().squeeze(1)
        if self.options.unknown != "popular":
            popular = popular[:0]
        return Batch(histories, Pairs.of(items, starts), by_model, popular, len(samples))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Top:
        """Find the best items of each user."""
        k, allowed = self.options.top_k, self.allowed
        found = Top(torch.full((batch.size, k), NONE), torch.full((batch.size, k), -torch.inf))
        if len(batch.by_model):
            device = self.scorer.device
            histories = Packed(*(each.to(device) for each in batch.histories))
            seen = Pairs(*(each.to(device) for each in batch.seen))
            queries = self.scorer.queries(histories)
            left_out = seen if self.options.seen == "leave_out" else None
            _put(found, batch.by_model, self._searched().top_k(queries, left_out))
        if len(batch.popular):
            counts = self._counts
            best = top_k(popularity(counts, 1), k, allowed=allowed)
            share = (best.scores / max(1, counts.sum())).float()
            _put(found, batch.popular, Top(best.items, share))
        return found

    def _searched(self) -> Search:
        """Return the search; where it is not exact, compared with that on users of the log in hand."""
        if self.options.search == "faiss":
            assert self._held is not None
            self.search.check(self._held.sequences, self.options.seen == "leave_out")
        return self.search

    def _finish(self, rows: Iterator[Row], parts: Path, results: Path) -> None:
        """Write how much of the exact answer was found."""
        self._searched().write(results)

    def rows(self, outputs: Top, records: Sequence[Record]) -> list[Row]:
        """Make a row an item, a user's best first."""
        ids, found = self.ids.ids, zip(outputs.items.tolist(), outputs.scores.tolist(), strict=True)
        return [
            {"user_id": record.id, "rank": rank, "item_id": ids[item], "score": score}
            for record, (items, scores) in zip(records, found, strict=True)
            for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
            if item != NONE
        ]


def _put(found: Top, places: Tensor, best: Top) -> None:
    """Put the best of some users in their places."""
    found.items[places] = best.items.cpu()
    found.scores[places] = best.scores.float().cpu()


def _state_of(source: Source) -> Files | None:
    """Return the names, sizes and times of a source's files; None of a DataFrame."""
    if not isinstance(source, str | Path | Sequence):
        return None
    about = [(path, path.stat()) for path in list_files(source)]
    return [(str(path), each.st_size, each.st_mtime_ns) for path, each in about]
