"""The inputs of prediction: molecules, graphs of tables, nodes of graphs seen whole or sampled.

Each cuts a source into shards, reads a shard's records, prepares each, and makes batches of them: `Records`
says how. What is computed of a record depends on that record alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from manyheads.core import datasets, tables
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Source
from manyheads.graph import stored
from manyheads.graph.collection import GraphSet
from manyheads.graph.graphs import Graphs
from manyheads.graph.molecules import Molecule, smiles_to_graph
from manyheads.graph.preprocessing import Preprocessing
from manyheads.graph.sources import (
    Columns,
    Folder,
    Smiles,
    Stretch,
    cut_smiles,
    graph_folders,
    read_smiles,
)
from manyheads.graph.stored import LargeGraph

MOST_NODES = 1 << 15  # that the model sees at once, if not one graph has more
SEED = 0  # of the neighbours that are sampled: always the same


class Piece(NamedTuple):
    """What the model sees at once, and which rows of its outputs are wanted; None for all, in order."""

    graphs: Graphs
    rows: Tensor | None


Batch: TypeAlias = list[Piece]


class Records(Protocol):
    """What a predictor needs of a kind of input."""

    batch_size: int
    shard_size: int

    def shards(self, source: Source, size: int) -> list[Any]:
        """Cut a source into shards of about `size` records."""

    def count(self, shard: Any) -> int:
        """Return the records of a shard."""

    def read(self, shard: Any) -> Iterator[Any]:
        """Stream a shard's records, each with its `id`."""

    def prepare(self, record: Any) -> Any:
        """Turn a record into a sample; raises BadRecord."""

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Put samples together; the pieces' rows in order are the samples'."""


class Molecules:
    """SMILES, a row each.

    Args:
        preprocessing: Of the model folder.
        columns: The tables' columns.
    """

    batch_size, shard_size = 256, 2048

    def __init__(self, preprocessing: Preprocessing, columns: Columns) -> None:
        self.preprocessing, self.columns = preprocessing, columns

    def shards(self, source: Source, size: int) -> list[Stretch]:
        """Cut tables into stretches of rows."""
        return cut_smiles(source, self.columns, size)

    def count(self, shard: Stretch) -> int:
        """Return the rows of a stretch."""
        return shard.count

    def read(self, shard: Stretch) -> Iterator[Smiles]:
        """Stream rows."""
        return read_smiles(shard, self.columns)

    def prepare(self, record: Smiles) -> Molecule:
        """Make a graph of a SMILES."""
        return smiles_to_graph(record.text, self.preprocessing.features)

    def collate(self, samples: Sequence[Molecule]) -> Batch:
        """Encode molecules and put them together."""
        sizes = [each.x.shape[0] for each in samples]
        return [_piece(GraphSet.of(samples[i:j]), self.preprocessing) for i, j in cuts(sizes, MOST_NODES)]


@dataclass(frozen=True)
class GraphRecord:
    """A graph whose tables have not been read."""

    folder: Folder

    @property
    def id(self) -> str:
        """Its name within the source; where the source is this graph alone, its folder's."""
        return self.folder.id or Path(self.folder.nodes).resolve().parent.name


class WholeGraphs:
    """Graphs of tables, a row each."""

    batch_size, shard_size = 128, 1024

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def shards(self, source: Source, size: int) -> list[tuple[Folder, ...]]:
        """Cut a source's folders into runs."""
        found = graph_folders(source)
        return [tuple(found[i : i + size]) for i in range(0, len(found), size)]

    def count(self, shard: Sequence[Folder]) -> int:
        """Return the graphs of a run."""
        return len(shard)

    def read(self, shard: Sequence[Folder]) -> Iterator[GraphRecord]:
        """Name the graphs; `prepare` opens them."""
        return map(GraphRecord, shard)

    def prepare(self, record: GraphRecord) -> GraphSet:
        """Read a graph's tables."""
        try:
            return _read(record.folder, self.preprocessing)
        except BadRecord:
            raise
        except DataError as error:
            raise BadRecord(str(error)) from None

    def collate(self, samples: Sequence[GraphSet]) -> Batch:
        """Encode graphs and put them together."""
        sizes = [each.x.shape[0] for each in samples]
        return [_piece(GraphSet.join(samples[i:j]), self.preprocessing) for i, j in cuts(sizes, MOST_NODES)]


@dataclass(frozen=True)
class NodeRange:
    """Nodes of one graph, by their numbers; of a graph that is sampled also where its arrays are."""

    folder: Folder
    first: int
    stop: int
    arrays: Path | None = None


class Node(NamedTuple):
    """A node of a graph that is in memory, or mapped into it."""

    id: str
    number: int
    graph: Graphs | LargeGraph


class Nodes:
    """Nodes of graphs of tables, a row each: of graphs seen whole, or by what is sampled around each node.

    Args:
        preprocessing: Of the model folder.
        fanouts: Edges of a node that are taken in each hop; None: the model sees graphs whole.
    """

    batch_size, shard_size = 256, 8192

    def __init__(self, preprocessing: Preprocessing, fanouts: Sequence[int] | None) -> None:
        self.preprocessing, self.fanouts = preprocessing, fanouts

    def shards(self, source: Source, size: int) -> list[tuple[NodeRange, ...]]:
        """Cut the nodes of a source's graphs into runs of at most `size`; sampled graphs are read here."""
        found: list[tuple[NodeRange, ...]] = []
        held: list[NodeRange] = []
        room = size
        for folder in graph_folders(source):
            arrays = None if self.fanouts is None else self._stored(folder)
            total = sum(rows.count for rows in tables.cut(Path(folder.nodes), 1 << 40))
            first = 0
            while first < total:
                stop = min(first + room, total)
                held.append(NodeRange(folder, first, stop, arrays))
                room -= stop - first
                first = stop
                if not room:
                    found.append(tuple(held))
                    held, room = [], size
        return [*found, tuple(held)] if held else found

    def _stored(self, folder: Folder) -> Path:
        """Read and encode a graph, if that has not been done before."""
        of = replace(self.preprocessing, distances=0)  # of all pairs of nodes: not of a large graph
        about = {key: of.to_json()[key] for key in sorted(of.to_json()) if key not in ("target", "fanouts")}

        def read() -> GraphSet:
            return of.encode(_read(folder, of), _cache("encodings"))

        return stored.stored(_cache("graphs"), [folder.nodes, folder.edges], about, read)

    def count(self, shard: Sequence[NodeRange]) -> int:
        """Return the nodes of a run."""
        return sum(part.stop - part.first for part in shard)

    def read(self, shard: Sequence[NodeRange]) -> Iterator[Node]:
        """Stream nodes."""
        for part in shard:
            prefix = f"{part.folder.id}/" if part.folder.id else ""
            if part.arrays is not None:
                large = stored.load(part.arrays)
                graph, names = large, large.ids[part.first : part.stop].to_pylist()
            else:
                graph, names = _whole(part.folder, _stamp(part.folder), self.preprocessing)
                names = names[part.first : part.stop]
            for number, name in enumerate(names, part.first):
                yield Node(f"{prefix}{name}", number, graph)

    def prepare(self, record: Node) -> Node:
        """Give the node: its graph was read as a whole."""
        return record

    def collate(self, samples: Sequence[Node]) -> Batch:
        """Sample around the nodes, or put those of one graph together."""
        found = []
        for _, own in groupby(samples, key=lambda node: id(node.graph)):
            nodes = list(own)
            graph, numbers = nodes[0].graph, torch.tensor([node.number for node in nodes])
            if isinstance(graph, Graphs):
                found.append(Piece(graph, numbers))
            else:
                found += self._sampled(graph, numbers)
        return found

    def _sampled(self, graph: LargeGraph, numbers: Tensor) -> Batch:
        assert self.fanouts is not None
        graphs, places = graph.around(numbers[:, None], self.fanouts, SEED, self.preprocessing.distances)
        half = len(numbers) // 2
        if half and graphs.nodes > MOST_NODES:
            return self._sampled(graph, numbers[:half]) + self._sampled(graph, numbers[half:])
        return [Piece(graphs, places.flatten())]


def _read(folder: Folder, preprocessing: Preprocessing) -> GraphSet:
    from manyheads.graph.tables import read_graph

    return read_graph(folder.nodes, folder.edges, preprocessing)


def _stamp(folder: Folder) -> tuple[int, ...]:
    """Differs where a table has been written again: what is kept of it no longer holds."""
    stats = [os.stat(path) for path in (folder.nodes, folder.edges)]
    return tuple(part for stat in stats for part in (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@lru_cache(maxsize=1)
def _whole(
    folder: Folder, stamp: tuple[int, ...], preprocessing: Preprocessing
) -> tuple[Graphs, Sequence[str]]:
    """A graph as the model sees it whole, and its nodes' names; one is kept."""
    graphs = preprocessing.encode(_read(folder, preprocessing), _cache("encodings"))
    names = graphs.node_ids if graphs.node_ids is not None else [str(i) for i in range(graphs.x.shape[0])]
    return graphs.batch([0]), names


def _cache(name: str) -> Path:
    return datasets.cache_folder() / name


def _piece(graphs: GraphSet, preprocessing: Preprocessing) -> Piece:
    encoded = preprocessing.encode(graphs)
    return Piece(encoded.batch(torch.arange(len(encoded))), None)


def cuts(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield where to cut a row of things, so that each part's sizes are at most `most`, or it is one thing.

    Example:
        >>> list(cuts([3, 3, 9, 1], 6))
        [(0, 2), (2, 3), (3, 4)]
    """
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > most:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)
