"""What a part's batches are made of: many graphs, the nodes of one graph, or of samples around nodes.

A batch is a function of (seed, epoch, its number, its rows): workers and resuming change nothing in it. Each
kind of part has a `schedule`, the `jobs` of an epoch and the function that makes a batch of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from manyheads.core.buckets import Buckets
from manyheads.core.loading import BatchLoader, Indices, Job, Schedule
from manyheads.graph.collection import GraphSet
from manyheads.graph.encodings import flip_signs
from manyheads.graph.graphs import Graphs
from manyheads.graph.sampling import Adjacency, sample


class GraphBatch(TypedDict):
    """A batch: graphs, and what is known of them, of their nodes, or of pairs."""

    graphs: Graphs
    target: Tensor  # [R, targets] float32, NaN for unknown
    weight: Tensor | None  # [R], what each counts in training; None: all the same
    rows: Tensor | None  # [R], which of the model's outputs these are; None: all of them
    index: Tensor  # [R], numbers within the part


class Batches(Protocol):
    """What a loader needs of a part."""

    schedule: Schedule

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield what the schedule's epoch's batches are made of, from one of them on."""

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Make a batch."""


GraphLoader = BatchLoader[GraphBatch, GraphBatch]


def loader(part: Batches, workers: int) -> GraphLoader:
    """Return the batches of a part."""
    return BatchLoader(part.schedule, part.jobs, part.make, lambda batch: batch, workers)


class Flips:
    """One sign a column for a whole batch, another each batch of each epoch; without a seed all stay."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __call__(self, graphs: Graphs, epoch: int, number: int) -> Graphs:
        """Flip the encodings."""
        if self.seed is None or graphs.encoding is None:
            return graphs
        drawn = np.random.SeedSequence([self.seed, epoch, number, 2]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(drawn))
        return graphs._replace(encoding=flip_signs(graphs.encoding, generator))


class ManyGraphs:
    """A part that has graphs of its own; targets are of graphs or of their nodes.

    Args:
        graphs: The part's.
        buckets: Which graphs come when.
        flips: What is done to encodings by chance.
    """

    def __init__(self, graphs: GraphSet, buckets: Buckets, flips: Flips) -> None:
        self.graphs, self.buckets, self.flips = graphs, buckets, flips
        self.schedule = buckets.schedule

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the graphs, the epoch and the number of each batch."""
        epoch = self.schedule.epoch if self.buckets.shuffle else 0
        for number, indices in enumerate(self.buckets.plan(first), first):
            yield indices, epoch, number

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Put graphs together."""
        index = torch.from_numpy(indices).long()
        target = self.graphs.targets(index)
        assert target is not None
        return {
            "graphs": self.flips(self.graphs.batch(index), epoch, number),
            "target": target,
            "weight": self.graphs.weights(index),
            "rows": None,
            "index": self.graphs.node_rows(index) if self.graphs.level == "node" else index,
        }


class WholeGraph:
    """A part of the nodes of one graph, which the model sees as a whole: one batch an epoch.

    Args:
        graphs: The graph.
        nodes: The part's.
        flips: What is done to encodings by chance.
    """

    def __init__(self, graphs: GraphSet, nodes: Tensor, flips: Flips) -> None:
        self.graphs, self.nodes, self.flips = graphs, nodes, flips
        self.schedule = Schedule(1, 1)
        self._whole = graphs.batch(torch.zeros(1, dtype=torch.int64))

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the one batch."""
        for indices in self.schedule.plan(first):
            yield indices, self.schedule.epoch, 0

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Give the graph."""
        assert self.graphs.y is not None
        return {
            "graphs": self.flips(self._whole, epoch, number),
            "target": self.graphs.y[self.nodes],
            "weight": None if self.graphs.weight is None else self.graphs.weight[self.nodes],
            "rows": self.nodes,
            "index": torch.arange(len(self.nodes)),
        }


class Neighbourhoods:
    """A part of the nodes of one graph, seen by what is sampled around a batch of them.

    Args:
        graphs: The graph.
        nodes: The part's.
        adjacency: The graph's edges.
        fanouts: How many edges of a node are taken in each hop.
        schedule: Which of the nodes come when.
        seed: Of the sampling; each epoch of a part that is shuffled has others.
        flips: What is done to encodings by chance.
    """

    def __init__(
        self,
        graphs: GraphSet,
        nodes: Tensor,
        adjacency: Adjacency,
        fanouts: Sequence[int],
        schedule: Schedule,
        seed: int,
        flips: Flips,
    ) -> None:
        self.graphs, self.nodes, self.adjacency, self.fanouts = graphs, nodes, adjacency, fanouts
        self.schedule, self.seed, self.flips = schedule, seed, flips

    def jobs(self, first: int) -> Iterator[Job]:
        """Yield the nodes, the epoch and the number of each batch."""
        epoch = self.schedule.epoch if self.schedule.shuffle else 0
        for number, indices in enumerate(self.schedule.plan(first), first):
            yield indices, epoch, number

    def make(self, indices: Indices, epoch: int, number: int) -> GraphBatch:
        """Sample around nodes."""
        index = torch.from_numpy(indices).long()
        seeds = self.nodes[index]
        drawn = np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]
        found = sample(self.adjacency, seeds, self.fanouts, int(drawn))
        whole = self.graphs
        assert whole.y is not None
        graphs = Graphs(
            whole.x[found.nodes],
            found.edge_index,
            found.starts,
            None if whole.edge_attr is None else whole.edge_attr[found.edge_numbers],
            None if whole.encoding is None else whole.encoding[found.nodes],
            None if whole.roles is None else whole.roles[found.nodes],
        )
        return {
            "graphs": self.flips(graphs, epoch, number),
            "target": whole.y[seeds],
            "weight": None if whole.weight is None else whole.weight[seeds],
            "rows": found.seeds,
            "index": index,
        }
