"""Neighbourhoods of nodes in one large graph, sampled: what a model sees instead of the whole.

Which neighbours of a node are taken depends on the seed and that node alone: not on the other seeds, not on
the batch, not on the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import UsageError

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]
_PARTS = ("starts", "sources", "numbers")


@dataclass(frozen=True)
class Adjacency:
    """The incoming edges of each node of one graph.

    Args:
        starts: Where each node's edges begin, and the end of the last.
        sources: The node that each edge comes from; a node's edges keep their order.
        numbers: Each edge's number in the graph's `edge_index`.

    Shape:
        starts int64 `[N + 1]`; sources, numbers int32 `[E]`, int64 where numbers are larger.
    """

    starts: Numbers
    sources: Numbers
    numbers: Numbers

    @property
    def nodes(self) -> int:
        """Nodes of the graph."""
        return len(self.starts) - 1

    @classmethod
    def of(cls, edge_index: Tensor, nodes: int) -> Adjacency:
        """Sort a graph's edges by where they lead.

        Args:
            edge_index: Sources in row 0, destinations in row 1.
            nodes: Nodes of the graph, isolated ones included.

        Shape:
            edge_index `[2, E]`.

        Raises:
            ValueError: An edge names a node that is not there.
        """
        if edge_index.numel():
            low, high = (int(x) for x in edge_index.aminmax())
            if low < 0 or high >= nodes:
                raise ValueError(f"an edge names node {low if low < 0 else high}, and there are {nodes}")
        source, target = edge_index.cpu().numpy()
        small = max(nodes, len(source)) < 2**31
        order = np.argsort(target, kind="stable")
        starts = np.zeros(nodes + 1, np.int64)
        np.cumsum(np.bincount(target, minlength=nodes), out=starts[1:])
        kind = np.int32 if small else np.int64
        return cls(*map(_fixed, (starts, source[order].astype(kind), order.astype(kind))))

    def save(self, folder: Path) -> None:
        """Write the arrays into a folder that is there."""
        for name in _PARTS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Adjacency:
        """Map what `save` wrote into memory: processes share it, and it is read where it is used."""
        return cls(*(_fixed(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _PARTS))


def _fixed(array: Numbers) -> Numbers:
    # a plain array that cannot be written: what is mapped from a file is one, and so one compiled loop does
    found = np.asarray(array)
    found.flags.writeable = False
    return found


class Sampled(NamedTuple):
    """Graphs cut out of a large one, one after another.

    Attributes:
        nodes: Numbers of their nodes in the large graph; each graph begins with its seeds.
        edge_index: Their edges, between places in `nodes`, in order of destination.
        edge_numbers: Numbers of their edges in the large graph.
        starts: Where each graph's nodes begin, and the end of the last.
        seeds: The seeds' places in `nodes`.

    Shape:
        nodes `[n]`; edge_index `[2, e]`; edge_numbers `[e]`; starts int32 `[G + 1]`; seeds as given.
    """

    nodes: Tensor
    edge_index: Tensor
    edge_numbers: Tensor
    starts: Tensor
    seeds: Tensor


def sample(adjacency: Adjacency, seeds: Tensor, fanouts: Sequence[int], seed: int = 0) -> Sampled:
    """Gather the neighbourhoods of nodes, hop by hop, against the edges' direction.

    Of each node that is reached for the first time so many incoming edges are taken, without replacement, as
    its hop has. With a fanout of -1 for each of a model's layers its seeds' results are those of the whole
    graph; where a layer looks at the degree of the node that an edge comes from (GCN), one fanout more.

    Args:
        adjacency: The large graph.
        seeds: Numbers of nodes. A row of them: one graph around them all. Rows: a graph around each row, by
            itself, so that nothing depends on the other rows.
        fanouts: Edges of a node that are taken in each hop; -1 for all.
        seed: Another one takes other neighbours.

    Shape:
        seeds `[S]` or `[G, S]`.

    Raises:
        UsageError: A fanout is neither positive nor -1.
        ValueError: A seed is no node of the graph.

    Example:
        >>> sample(Adjacency.of(edge_index, nodes), torch.arange(128), [15, 10]).nodes[:128]
    """
    from manyheads.graph.sampling_kernels import neighbourhoods

    if any(each < 1 and each != -1 for each in fanouts):
        raise UsageError(f"fanouts must be positive, or -1 for all neighbours, not {list(fanouts)}")
    rows = np.atleast_2d(seeds.cpu().numpy().astype(np.int64))
    if rows.size and not (rows.min() >= 0 and rows.max() < adjacency.nodes):
        raise ValueError(f"seeds must be nodes from 0 to {adjacency.nodes - 1}")
    place = np.zeros(adjacency.nodes, np.int64)  # the system gives zero pages where they are touched
    key = np.uint64(seed % 2**64)
    hops = np.array(fanouts, np.int64)
    nodes, starts, found, source, target, picks = map(
        torch.from_numpy,
        neighbourhoods(adjacency.starts, adjacency.sources, rows, hops, key, place),
    )
    numbers = torch.from_numpy(adjacency.numbers[picks.numpy()].astype(np.int64))
    return Sampled(nodes, torch.stack([source, target]), numbers, starts.int(), found.view(seeds.shape))
