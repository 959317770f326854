"""Batches of links: edges and pairs without one, in a graph seen whole or by samples around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyheads.core.loading import Indices, Job, Schedule
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.links import Joined
from manyheads.graph.parts import Flips, GraphBatch
from manyheads.graph.sampling import Adjacency, sample


@dataclass(frozen=True)
class Asked:
    """What a part asks for: its edges, as many pairs without one, and those that edges are ranked among.

    Rows of a part: its edges; the pair beside each; then of each edge those that it is ranked among, which
    are no targets (NaN) but for `links.ranking`.

    Args:
        edges: The part's pairs of nodes.
        joined: Which pairs are joined by any edge of the graph.
        seed: Of the draws.
        negatives: How many each edge is ranked among.

    Shape:
        edges `[2, P]`.
    """

    edges: Tensor
    joined: Joined
    seed: int
    negatives: int = 0

    def __len__(self) -> int:
        return self.edges.shape[1]

    def __call__(self, index: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs of nodes, their targets, and their rows within the part.

        Args:
            index: Numbers of edges of the part.
            epoch, number: The batch's: they decide the draws with the seed.

        Shape:
            index `[B]`; the pairs `[2, R]`, targets `[R, 1]`, rows `[R]`.
        """
        edges, count, k = self.edges[:, index], len(index), self.negatives
        parts = [edges, self.joined.absent(count, (self.seed, epoch, number, 3))]
        rows = [index, index + len(self)]
        if k:
            parts.append(self.joined.absent_at(edges[0], k, (self.seed, epoch, number, 4)))
            rows.append((2 * len(self) + index[:, None] * k + torch.arange(k)).flatten())
        target = [torch.full((part.shape[1], 1), value) for part, value in zip(parts, _TARGETS, strict=False)]
        return torch.cat(parts, 1), torch.cat(target), torch.cat(rows)


_TARGETS = (1.0, 0.0, float("nan"))


class WholeLinks:
    """Links of a graph that the model sees as a whole: one batch an epoch.

    Args:
        seen: The graph, of the edges that may be seen alone.
        asked: What the part asks for.
        hidden: In training: the share of its edges that an epoch asks for and takes out of the graph; 0: all
            are asked for, and the graph stays as it is.
        train: Whether each epoch draws anew.
        flips: What is done to encodings by chance.
    """

    def __init__(
        self, seen: GraphSet, asked: Asked, flips: Flips, *, train: bool, hidden: float = 0.0
    ) -> None:
        self.asked, self.flips, self.train, self.hidden = asked, flips, train, hidden
        self.schedule = Schedule(1, 1)
        self._whole = seen.batch([0])

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the one batch."""
        for indices in self.schedule.plan(first):
            yield indices, self.schedule.epoch if self.train else 0, 0

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Give the graph and its pairs."""
        index, graphs = torch.arange(len(self.asked)), self._whole
        if self.hidden:
            order = np.random.default_rng([self.asked.seed, epoch, 5]).permutation(len(self.asked))
            index = torch.from_numpy(np.sort(order[: max(1, round(self.hidden * len(order)))]))
            graphs = without(graphs, self.asked.edges[:, index], self.asked.joined.directed)
        return _batch(self.flips(graphs, epoch, number), *self.asked(index, epoch, number))


class SampledLinks:
    """Links of a graph that the model sees by what is sampled around a batch of them.

    Args:
        seen: The graph, of the edges that may be seen alone.
        asked: What the part asks for; a batch's own edges are taken out of its sample.
        adjacency: The graph's edges.
        fanouts: How many edges of a node are taken in each hop.
        schedule: Which of the part's edges come when.
        flips: What is done to encodings by chance.
    """

    def __init__(
        self,
        seen: GraphSet,
        asked: Asked,
        adjacency: Adjacency,
        fanouts: Sequence[int],
        schedule: Schedule,
        flips: Flips,
    ) -> None:
        self.seen, self.asked, self.adjacency, self.fanouts = seen, asked, adjacency, fanouts
        self.schedule, self.flips = schedule, flips

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the edges, the epoch and the number of each batch."""
        epoch = self.schedule.epoch if self.schedule.shuffle else 0
        for number, indices in enumerate(self.schedule.plan(first), first):
            yield indices, epoch, number

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Sample around the nodes of edges and of pairs without one."""
        index = torch.from_numpy(indices).long()
        pairs, target, rows = self.asked(index, epoch, number)
        seeds, places = pairs.unique(return_inverse=True)
        drawn = np.random.SeedSequence([self.asked.seed, epoch]).generate_state(1)[0]
        found, whole = sample(self.adjacency, seeds, self.fanouts, int(drawn)), self.seen
        graphs = Graphs(
            whole.x[found.nodes],
            found.edge_index,
            found.starts,
            None if whole.edge_attr is None else whole.edge_attr[found.edge_numbers],
            None if whole.encoding is None else whole.encoding[found.nodes],
            None if whole.roles is None else whole.roles[found.nodes],
        )
        local = found.seeds[places]
        own = without(graphs, local[:, : len(index)], self.asked.joined.directed)
        return _batch(self.flips(own, epoch, number), local, target, rows)


def without(graphs: Graphs, pairs: Tensor, directed: bool) -> Graphs:
    """Take the edges between pairs of nodes out of a batch.

    Shape:
        pairs `[2, P]`.
    """
    gone = Joined.of(pairs, graphs.nodes, directed).has(graphs.edge_index)
    attr = graphs.edge_attr
    return graphs._replace(
        edge_index=graphs.edge_index[:, ~gone], edge_attr=None if attr is None else attr[~gone]
    )


def _batch(graphs: Graphs, pairs: Tensor, target: Tensor, rows: Tensor) -> GraphBatch:
    return {
        "graphs": graphs._replace(pairs=pairs),
        "target": target,
        "weight": None,
        "rows": None,
        "index": rows,
    }
