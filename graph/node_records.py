"""Nodes of graphs of tables as records of prediction: of graphs seen whole, or sampled around each node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from manyheads.core import datasets, tables
from manyheads.core.predictor import Source
from manyheads.graph import records, stored
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.preprocessing import Preprocessing
from manyheads.graph.records import Batch, Piece, below, cuts, runs, stamp
from manyheads.graph.sources import Folder, graph_folders
from manyheads.graph.stored import LargeGraph

SEED = 0  # of the neighbours that are sampled: always the same


class WholeSet(NamedTuple):
    """Graphs that models see whole, encoded; the one graph where there is one alone; the nodes' names."""

    graphs: GraphSet
    only: Graphs | None
    names: Sequence[str]


class Node(NamedTuple):
    """A node of graphs that are in memory, or mapped into it."""

    id: str
    number: int
    source: WholeSet | LargeGraph


# Tables, and where the arrays are if nodes are sampled; the first node, and the one behind the last
NodeRun: TypeAlias = "tuple[tuple[tuple[Folder, Path | None], int, int], ...]"


class Nodes:
    """Nodes of graphs of tables, a row each: of graphs seen whole, or by what is sampled around each node.

    Args:
        preprocessing: Of the model folder.
        fanouts: Edges of a node that are taken in each hop; None: the model sees graphs whole.
    """

    batch_size, shard_size = 256, 8192

    def __init__(self, preprocessing: Preprocessing, fanouts: Sequence[int] | None) -> None:
        self.preprocessing, self.fanouts = preprocessing, fanouts

    def shards(self, source: Source, size: int) -> list[NodeRun]:
        """Cut the nodes of a source's graphs into runs of at most `size`; sampled graphs are read here."""
        sized = (
            ((folder, None if self.fanouts is None else self.arrays(folder)), _rows(folder.nodes))
            for folder in graph_folders(source)
        )
        return list(runs(sized, size))

    def arrays(self, folder: Folder) -> Path:
        """Read and encode a graph that is sampled, if that has not been done before; return where it is."""
        of = replace(self.preprocessing, distances=0)  # of all pairs of nodes: not of a large graph
        about = {key: value for key, value in of.to_json().items() if key not in ("target", "fanouts")}

        def read() -> GraphSet:
            return of.encode(records.read(folder, of), _kept("encodings"))

        return stored.stored(_kept("graphs"), [folder.nodes, folder.edges], about, read)

    def count(self, shard: NodeRun) -> int:
        """Return the nodes of a run."""
        return sum(stop - first for _, first, stop in shard)

    def read(self, shard: NodeRun) -> Iterator[Node]:
        """Stream nodes."""
        source: WholeSet | LargeGraph
        for (folder, arrays), first, stop in shard:
            if arrays is not None:
                source = stored.load(arrays)
                names = source.ids[first:stop].to_pylist()
            else:
                source = whole_set(folder, stamp(folder), self.preprocessing)
                names = source.names[first:stop]
            for number, name in enumerate(names, first):
                yield Node(below(folder, name), number, source)

    def prepare(self, record: Node) -> Node:
        """Give the node: its graph was read as a whole."""
        return record

    def collate(self, samples: Sequence[Node]) -> Batch:
        """Sample around the nodes, or put their graphs together."""
        found = []
        for _, own in groupby(samples, key=lambda node: id(node.source)):
            nodes = list(own)
            source, numbers = nodes[0].source, torch.tensor([node.number for node in nodes])
            if isinstance(source, LargeGraph):
                found += self._sampled(source, numbers)
            elif source.only is not None:
                found.append(Piece(source.only, numbers))
            else:
                found += _graphs_of(source.graphs, numbers)
        return found

    def _sampled(self, graph: LargeGraph, numbers: Tensor) -> Batch:
        assert self.fanouts is not None
        graphs, places = graph.around(numbers[:, None], self.fanouts, SEED, self.preprocessing.distances)
        half = len(numbers) // 2
        if half and graphs.nodes > records.MOST_NODES:
            return self._sampled(graph, numbers[:half]) + self._sampled(graph, numbers[half:])
        return [Piece(graphs, places.flatten())]


def _graphs_of(graphs: GraphSet, numbers: Tensor) -> Batch:
    """Put together the graphs that some nodes, in order, are of."""
    owner = torch.searchsorted(graphs.nodes, numbers, right=True) - 1
    chosen, counts = owner.unique_consecutive(return_counts=True)
    found, done = [], 0
    for first, last in cuts(graphs.sizes[chosen].tolist(), records.MOST_NODES):
        batch, count = graphs.batch(chosen[first:last]), int(counts[first:last].sum())
        own = torch.repeat_interleave(batch.starts[:-1].long(), counts[first:last])
        nodes = numbers[done : done + count]
        found.append(Piece(batch, own + nodes - graphs.nodes[owner[done : done + count]]))
        done += count
    return found


def _rows(path: str) -> int:
    return sum(rows.count for rows in tables.cut(Path(path), records.WHOLE))


@lru_cache(maxsize=1)
def whole_set(folder: Folder, stamp: tuple[int, ...], preprocessing: Preprocessing) -> WholeSet:
    """Return graphs as the model sees them whole; one folder's are kept."""
    graphs = preprocessing.encode(records.read(folder, preprocessing), _kept("encodings"))
    return WholeSet(graphs, graphs.batch([0]) if graphs.whole else None, stored.names_of(graphs))


def _kept(name: str) -> Path:
    """Where something is kept that can be computed again."""
    return datasets.cache_folder() / name
