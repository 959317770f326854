"""The best items for many users: all are looked at, or, by faiss, some lists of a large catalogue.

What faiss finds is compared with the exact search on some of the users, and refused below a stated recall.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.recsys.models.encoder import FIRST, Items, Packed, starts_of
from manyheads.recsys.retrieval import NONE, Factors, Pairs, Top, top_k
from manyheads.recsys.scorers import Scorer
from manyheads.recsys.sequences import Sequences

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)

SAMPLE = 256  # users that both searches are compared on
REPORT = "search.json"
POINTS = 39  # items a list that faiss wants at least, to find the lists by


@dataclass(frozen=True)
class Approximate:
    """A search by faiss.

    Args:
        probes: Lists that are searched for a user.
        min_recall: What must be found of the exact answer at least, in percent.
    """

    probes: int
    min_recall: int


class Recall(NamedTuple):
    """How much of the exact search's answer faiss finds.

    Args:
        share: Of the items.
        users: That were looked at.
        k: Items a user.
    """

    share: float
    users: int
    k: int


class Search:
    """Finds the best items of a scorer.

    Args:
        scorer: Scores them.
        k: Items a user.
        allowed: The only ones that are given, in order; None for all.
        approximate: How faiss searches; None searches exactly.

    Shape:
        allowed `[M]`.

    Raises:
        UsageError: faiss is not installed.
    """

    def __init__(
        self, scorer: Scorer, k: int, allowed: Tensor | None = None, approximate: Approximate | None = None
    ) -> None:
        self.scorer, self.k, self.allowed, self.approximate = scorer, k, allowed, approximate
        self.recall: Recall | None = None
        self._index: Index | None = None
        if approximate is not None:
            _faiss()

    def top_k(self, queries: Tensor, seen: Pairs | None) -> Top:
        """Return the best items for queries `[B, H]`; `check` comes before, where faiss searches."""
        if self.approximate is None:
            return self._exact(queries, seen)
        assert self._index is not None
        return self._index.top_k(queries, self.k, seen)

    def _exact(self, queries: Tensor, seen: Pairs | None) -> Top:
        allowed = None if self.allowed is None else self.allowed.to(queries.device)
        return top_k(Factors(queries, *self.scorer.items()), self.k, seen, allowed)

    @torch.inference_mode()
    def check(self, sequences: Sequences, leave_out: bool) -> None:
        """Compare with the exact search, once, on users that are spread over a log.

        Args:
            sequences: The log, with -1 for items that are not known.
            leave_out: Users are not given what they have.

        Raises:
            UsageError: Too little is found.
        """
        if self.approximate is None or self.recall is not None:
            return
        index = self._index or Index(self.scorer.items(), self.allowed, self.approximate.probes)
        users = np.flatnonzero(np.bincount(sequences.owners()[sequences.items >= 0], minlength=1))
        some = [sequences.history(user) for user in users[_spread(len(users))]]
        known = [torch.from_numpy(items[items >= 0]).long() for items in some]
        items = torch.cat([*known, torch.zeros(0, dtype=torch.long)]).to(self.scorer.device)
        starts = starts_of(torch.tensor([len(each) for each in known], dtype=torch.long)).to(items.device)
        queries = self.scorer.queries(Packed(items + FIRST, starts))
        seen = Pairs.of(items, starts) if leave_out else None
        self._index = index
        found = compare(self._exact(queries, seen), index.top_k(queries, self.k, seen))
        share, count, k = found
        text = f"faiss finds {share:.1%} of the exact {k} best items of {count} users"
        if 100 * share < self.approximate.min_recall:
            raise UsageError(
                f"{text}, below --min-recall {self.approximate.min_recall}: raise --probes "
                f"({index.index.nprobe} of {index.lists} lists now), or search exactly"
            )
        log.info(text)
        self.recall = found

    def write(self, folder: Path) -> None:
        """Write what `check` found into a folder."""
        assert self.recall is not None and self._index is not None
        about = {"search": "faiss", "probes": self._index.index.nprobe, "lists": self._index.lists}
        text = json.dumps(about | {"recall": self.recall._asdict()}, indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")


class Index:
    """Items in lists of like ones, by their inner products; a bias is a coordinate more.

    Args:
        items: What queries are compared with.
        allowed: The only items that are given, in order; None for all.
        probes: Lists that are searched for a user.

    Shape:
        allowed `[M]`.

    Raises:
        UsageError: faiss is not installed.
    """

    def __init__(self, items: Items, allowed: Tensor | None, probes: int) -> None:
        faiss = _faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())
        vectors = _with_bias(items.weight, items.bias)
        self.numbers = None if allowed is None else allowed.cpu().numpy()
        if self.numbers is not None:
            vectors = np.ascontiguousarray(vectors[self.numbers])
        self.biased, self.count = items.bias is not None, len(vectors)
        self.lists = max(1, min(int(4 * self.count**0.5), self.count // POINTS))
        self.index: Any = faiss.index_factory(
            vectors.shape[1], f"IVF{self.lists},Flat", faiss.METRIC_INNER_PRODUCT
        )
        self.index.train(vectors)
        self.index.add(vectors)
        self.index.nprobe = min(probes, self.lists)

    def top_k(self, queries: Tensor, k: int, seen: Pairs | None) -> Top:
        """Return the best items that are found, on the CPU: -1 and -inf where there are fewer.

        Of equal scores the item with the lower number comes first.

        Shape:
            queries `[B, H]`.
        """
        rows = len(queries)
        more = int(torch.bincount(seen.rows, minlength=1).max()) if seen is not None and len(seen.rows) else 0
        ones = torch.ones(len(queries)) if self.biased else None
        scores, found = self.index.search(_with_bias(queries, ones), min(k + more, self.count))
        if self.numbers is not None:
            found = np.where(found >= 0, self.numbers[found.clip(min=0)], NONE)
        gone = found < 0
        if seen is not None:
            gone |= _among(found, seen)
        scores = np.where(gone, -np.inf, scores)
        order = np.lexsort((found, -scores))[:, :k]
        items = np.full((rows, k), NONE, np.int64)
        values = np.full((rows, k), -np.inf, np.float32)
        width = order.shape[1]
        values[:, :width] = np.take_along_axis(scores, order, 1)
        items[:, :width] = np.where(np.isfinite(values[:, :width]), np.take_along_axis(found, order, 1), NONE)
        return Top(torch.from_numpy(items), torch.from_numpy(values))


def compare(exact: Top, found: Top) -> Recall:
    """Compare two searches for the same users."""
    wanted, got = exact.items.cpu().numpy(), found.items.cpu().numpy()
    rows = np.arange(len(wanted))[:, None]
    width = 2 + int(max(wanted.max(initial=0), got.max(initial=0)))
    real = wanted >= 0
    hits = np.isin((rows * width + wanted)[real], (rows * width + got)[got >= 0])
    return Recall(float(hits.mean()) if len(hits) else 1.0, len(wanted), wanted.shape[1])


def _spread(count: int) -> NDArray[np.int64]:
    """Return the places of some of so many users, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64))


def _with_bias(x: Tensor, last: Tensor | None) -> NDArray[np.float32]:
    x = x.detach().float().cpu()
    if last is not None:
        x = torch.cat([x, last.detach().float().cpu()[:, None]], 1)
    return np.ascontiguousarray(x.numpy())


def _among(found: NDArray[np.int64], seen: Pairs) -> NDArray[np.bool_]:
    """Tell which items of each row are among its seen ones."""
    rows, items = seen.rows.cpu().numpy(), seen.items.cpu().numpy()
    width = 2 + int(max(found.max(initial=0), items.max(initial=0)))
    keys = np.arange(len(found))[:, None] * width + found
    return np.isin(keys, rows * width + items)


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise UsageError("--search faiss needs faiss: pip install 'manyheads[faiss]'") from None
    return faiss
