"""Links: which pairs of one graph's nodes are joined. Its edges divided, and pairs without an edge drawn.

What validation and test ask for is never among the edges that a model sees, and pairs that count as not
joined are joined nowhere in the graph. Every draw is decided by a seed, the epoch and the batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.graph.splits import Part

Numbers: TypeAlias = NDArray[np.int64]
ROUNDS = 1000  # draws for a pair without an edge, before the graph is taken for one that has none
HITS = (1, 10)


@dataclass(frozen=True)
class Links:
    """What a step asks for where pairs of nodes are predicted, and what edges are measured against.

    Args:
        hidden: Share of the training edges that a step asks for, others each time, and does not see; the rest
            is seen. 0: all are asked for and all are seen, as published for graph auto-encoders. Steps on
            sampled neighbours never see the edges that they ask for.
        negatives: Pairs without an edge that each edge of validation and test is ranked among, beside the one
            that it is paired with; drawn at one end of it. 0: no ranking.
    """

    hidden: float = 0.0
    negatives: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.hidden < 1:
            raise UsageError(f"links.hidden must be from 0 to below 1, not {self.hidden:g}")
        if self.negatives < 0:
            raise UsageError(f"links.negatives must be 0 or more, not {self.negatives}")


@dataclass(frozen=True)
class Joined:
    """Which pairs of a graph's nodes are joined, by any of its edges.

    Args:
        keys: A number for each pair that is, sorted.
        nodes: Of the graph.
        directed: Whether (a, b) and (b, a) are two pairs.
    """

    keys: Numbers
    nodes: int
    directed: bool = False

    @classmethod
    def of(cls, edge_index: Tensor, nodes: int, directed: bool = False) -> Joined:
        """Take a graph's edges; a node joined to itself is no pair."""
        edge_index = edge_index[:, edge_index[0] != edge_index[1]]
        return cls(np.unique(_keys(edge_index, nodes, directed)), nodes, directed)

    @property
    def pairs(self) -> Tensor:
        """The pairs, `[2, P]`; without directions the lower number first."""
        return torch.from_numpy(np.stack(np.divmod(self.keys, self.nodes)))

    def __contains__(self, pair: tuple[int, int]) -> bool:
        return bool(self.has(torch.tensor([[pair[0]], [pair[1]]]))[0])

    def has(self, pairs: Tensor) -> Tensor:
        """Which pairs are joined.

        Shape:
            pairs `[2, P]`; the result `[P]`.
        """
        return torch.from_numpy(_within(_keys(pairs, self.nodes, self.directed), self.keys))

    def absent(self, count: int, seed: Sequence[int]) -> Tensor:
        """Draw pairs of different nodes that are not joined, each as likely as another; one may come twice.

        Args:
            count: How many.
            seed: Decides which.

        Shape:
            The result `[2, count]`.

        Raises:
            DataError: All nodes are joined.
        """
        rng = np.random.default_rng(list(seed))
        return self._draw(count, lambda rows: rng.integers(0, self.nodes, (2, len(rows))))

    def absent_at(self, ends: Tensor, count: int, seed: Sequence[int]) -> Tensor:
        """Draw pairs from given first nodes to others that they are not joined with.

        Shape:
            ends `[P]`; the result `[2, P * count]`, those of a node in a row.

        Raises:
            DataError: A node is joined with all others.
        """
        rng = np.random.default_rng(list(seed))
        first = ends.numpy().repeat(count)

        def pairs(rows: Numbers) -> Numbers:
            return np.stack([first[rows], rng.integers(0, self.nodes, len(rows))])

        return self._draw(len(first), pairs)

    def _draw(self, count: int, pairs: Any) -> Tensor:
        """Draw again what is joined, or is one node twice, until nothing is."""
        found = np.zeros((2, count), np.int64)
        rows = np.arange(count)
        for _ in range(ROUNDS):
            if not len(rows):
                return torch.from_numpy(found)
            found[:, rows] = drawn = pairs(rows)
            keys = _keys(torch.from_numpy(drawn), self.nodes, self.directed)
            rows = rows[(drawn[0] == drawn[1]) | _within(keys, self.keys)]
        raise DataError(
            "links: there are no pairs of nodes without an edge, or hardly any, to be told from edges"
        )


@dataclass(frozen=True)
class Division:
    """A graph's edges, divided.

    Args:
        parts: The pairs that each part asks for; those of training are seen, too.
        seen: Numbers of the edges that the model sees.

    Shape:
        parts `[2, P]`; seen `[M]`.
    """

    parts: dict[Part, Tensor]
    seen: Tensor


def divide(edge_index: Tensor, joined: Joined, fractions: Sequence[float], seed: int) -> Division:
    """Divide a graph's edges by chance: both directions of an edge, and repetitions, are in one part.

    Args:
        edge_index: Sources in row 0, destinations in row 1.
        joined: Of these edges.
        fractions: Of training, validation and test.
        seed: Another one divides in another way.

    Shape:
        edge_index `[2, E]`.

    Raises:
        DataError: There are too few edges.
    """
    count, total = len(joined.keys), sum(fractions)
    val, test = (round(each / total * count) for each in fractions[1:])
    if min(val, test, count - val - test) < 1:
        raise DataError(f"links: {count} edges are too few to divide into training, validation and test")
    order, pairs = np.random.default_rng([seed, 0]).permutation(count), joined.pairs
    held = joined.keys[np.sort(order[: val + test])]
    keys = _keys(edge_index, joined.nodes, joined.directed)
    seen = torch.from_numpy(np.flatnonzero(~_within(keys, held)))
    bounds: dict[Part, tuple[int, int]] = {"train": (val + test, count), "val": (0, val)}
    bounds["test"] = (val, val + test)
    return Division({name: pairs[:, np.sort(order[a:b])] for name, (a, b) in bounds.items()}, seen)


def ranking(scores: Tensor, target: Tensor) -> dict[str, float]:
    """Return how high edges rank among sampled pairs without one: their figures begin with `sampled_`.

    They are higher than figures among all nodes would be. A tie counts half.

    Args:
        scores: Of rows as `link_parts.Asked` lays them out.
        target: 1 for an edge, 0 for the pair without one beside it, NaN for those that it is ranked among.

    Shape:
        scores, target `[R]`.
    """
    edges = scores[target == 1]
    others = scores[target.isnan()]
    if not len(edges) or not len(others):
        return {}
    others = others.view(len(edges), -1)
    higher = (others > edges[:, None]).sum(1) + (others == edges[:, None]).sum(1) / 2
    rank = 1.0 + higher.double()
    hits = {f"sampled_hits_{k}": float((rank <= k).double().mean()) for k in HITS}
    return {"sampled_mrr": float((1 / rank).mean())} | hits


def _keys(pairs: Tensor, nodes: int, directed: bool) -> Numbers:
    """A number for each pair."""
    first, second = pairs.long().numpy()
    if not directed:
        first, second = np.minimum(first, second), np.maximum(first, second)
    return np.asarray(first * nodes + second)


def _within(keys: Numbers, those: Numbers) -> NDArray[np.bool_]:
    """Which keys are among those, which are sorted."""
    if not len(those):
        return np.zeros(len(keys), np.bool_)
    place = np.searchsorted(those, keys).clip(max=len(those) - 1)
    return np.asarray(those[place] == keys)
