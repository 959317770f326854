"""Batches of links: edges and pairs without one, in a graph seen whole or by samples around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.core.loading import Indices, Job, Schedule
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.links import Joined, divide
from manyheads.graph.parts import Flips, GraphBatch
from manyheads.graph.preprocessing import Target
from manyheads.graph.sampling import Adjacency, sample
from manyheads.graph.splits import PARTS, Part, Split


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
        fresh: Whether each batch of each epoch draws other pairs without an edge; else an edge keeps its own.

    Shape:
        edges `[2, P]`.
    """

    edges: Tensor
    joined: Joined
    seed: tuple[int, ...]
    negatives: int = 0
    fresh: bool = False

    def __len__(self) -> int:
        return self.edges.shape[1]

    def __call__(self, index: Tensor, epoch: int = 0, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs of nodes, their targets, and their rows within the part.

        Args:
            index: Numbers of edges of the part.
            epoch, number: The batch's; where draws are fresh they decide them with the seed.

        Shape:
            index `[B]`; the pairs `[2, R]`, targets `[R, 1]`, rows `[R]`.
        """
        edges, k = self.edges[:, index], self.negatives
        if self.fresh:
            parts = [edges, self.joined.absent(len(index), (*self.seed, epoch, number, 3))]
        else:
            parts = [edges, self._beside[:, index]]
        rows = [index, index + len(self)]
        if k:
            among = (index[:, None] * k + torch.arange(k)).flatten()
            parts.append(self._among[:, among])
            rows.append(2 * len(self) + among)
        target = [torch.full((part.shape[1], 1), value) for part, value in zip(parts, _TARGETS, strict=False)]
        return torch.cat(parts, 1), torch.cat(target), torch.cat(rows)

    @cached_property
    def _beside(self) -> Tensor:
        return self.joined.absent(len(self), (*self.seed, 3))

    @cached_property
    def _among(self) -> Tensor:
        return self.joined.absent_at(self.edges[0], self.negatives, (*self.seed, 4))


_TARGETS = (1.0, 0.0, float("nan"))
EDGE = Target("multilabel", ("edge",))  # the chance that two nodes are joined


@dataclass(frozen=True)
class LinkSet:
    """A graph whose edges are divided.

    Args:
        seen: The graph, with the edges alone that may be seen.
        joined: Which pairs are joined by any edge.
        parts: The pairs that each part asks for.
    """

    seen: GraphSet
    joined: Joined
    parts: dict[Part, Tensor]

    @staticmethod
    def of(graphs: GraphSet, split: Split, directed: bool) -> LinkSet:
        """Divide the edges of one graph, which is not encoded: encodings must not know of hidden edges.

        Raises:
            UsageError: There are several graphs, or the split is not by chance.
        """
        if not graphs.whole:
            raise UsageError(f"pairs are predicted of the nodes of one graph, and there are {len(graphs)}")
        if split.kind not in ("standard", "random"):
            raise UsageError(f"edges are divided by chance: split.kind {split.kind!r} is not for them")
        joined = Joined.of(graphs.edge_index, graphs.x.shape[0], directed)
        found = divide(graphs.edge_index, joined, split.fractions, split.seed)
        attr = graphs.edge_attr
        seen = replace(
            graphs,
            edge_index=graphs.edge_index[:, found.seen],
            edges=torch.tensor([0, len(found.seen)]),
            edge_attr=None if attr is None else attr[found.seen],
            y=None,
            weight=None,
            level="node",
        )
        return LinkSet(seen, joined, found.parts)

    def targets(self, part: Part) -> Tensor:
        """Return what is known of a part's rows: its edges, then as many pairs without one, `[2 * P, 1]`."""
        edges = torch.ones(self.parts[part].shape[1], 1)
        return torch.cat([edges, torch.zeros_like(edges)])

    def ids(self, part: Part, seed: int) -> list[str]:
        """Return the names of the rows of `targets`: the nodes of each pair."""
        pairs, _, _ = self.asked(part, seed)(torch.arange(self.parts[part].shape[1]))
        names = self.seen.node_ids
        called = [[str(i) if names is None else names[i] for i in ends] for ends in pairs.tolist()]
        return [f"{a} - {b}" for a, b in zip(*called, strict=True)]

    def asked(self, part: Part, seed: int, negatives: int = 0) -> Asked:
        """Return what a part asks for; training's edges are not ranked."""
        train = part == "train"
        draws = (seed, PARTS.index(part))
        return Asked(self.parts[part], self.joined, draws, 0 if train else negatives, train)


class WholeLinks:
    """Links of a graph that the model sees as a whole: one batch an epoch.

    Args:
        seen: The graph, of the edges that may be seen alone.
        asked: What the part asks for.
        flips: What is done to encodings by chance.
        hidden: In training: the share of its edges that an epoch asks for and takes out of the graph; 0: all
            are asked for, and the graph stays as it is.
    """

    def __init__(self, seen: GraphSet, asked: Asked, flips: Flips, hidden: float = 0.0) -> None:
        self.asked, self.flips, self.hidden = asked, flips, hidden
        self.schedule = Schedule(1, 1)
        self._whole = seen.batch([0])

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the one batch."""
        for indices in self.schedule.plan(first):
            yield indices, self.schedule.epoch, 0

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Give the graph and its pairs."""
        index, graphs = torch.arange(len(self.asked)), self._whole
        if self.hidden:
            order = np.random.default_rng([*self.asked.seed, epoch, 5]).permutation(len(self.asked))
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
        drawn = np.random.SeedSequence([*self.asked.seed, epoch]).generate_state(1)[0]
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
