"""Pairs of a graph's nodes as records of prediction: are they joined? A graph is seen whole, or by samples.

The model sees all edges of the table `edges`, that of a pair too where there is one: edges that are to be
tested must not be in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from manyheads.core import tables
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Source
from manyheads.core.tables import Rows
from manyheads.graph import records, stored
from manyheads.graph.node_records import SEED, Nodes, WholeSet, whole_set
from manyheads.graph.preprocessing import Preprocessing
from manyheads.graph.records import Batch, Piece, below, stamp
from manyheads.graph.sources import Folder, graph_folders, pairs_of
from manyheads.graph.stored import LargeGraph

# Tables, where the arrays are if the graph is sampled, and some rows of the table of pairs
PairRun: TypeAlias = "tuple[Folder, Path | None, Rows]"


class Pair(NamedTuple):
    """Two nodes by their names, and their graph; None for an empty cell."""

    id: str
    ends: tuple[str | None, str | None]
    source: WholeSet | LargeGraph


class PairSample(NamedTuple):
    """Two nodes by their numbers, and their graph."""

    ends: tuple[int, int]
    source: WholeSet | LargeGraph


class Pairs:
    """Pairs of nodes of the graphs of tables, a row each.

    Args:
        preprocessing: Of the model folder.
        fanouts: Edges of a node that are taken in each hop; None: the model sees graphs whole.
    """

    batch_size, shard_size = 4096, 65_536

    def __init__(self, preprocessing: Preprocessing, fanouts: Sequence[int] | None) -> None:
        self.preprocessing, self.fanouts = preprocessing, fanouts
        self.nodes = Nodes(preprocessing, fanouts)
        self.batch_size = Pairs.batch_size if fanouts is None else Nodes.batch_size

    def shards(self, source: Source, size: int) -> list[PairRun]:
        """Cut the tables of pairs into runs of at most `size`; sampled graphs are read here."""
        found = []
        for folder in graph_folders(source):
            path = pairs_of(folder)
            wanted = (self.preprocessing.names.source, self.preprocessing.names.target)
            tables.check_columns(str(path), tables.column_names(path), wanted)
            arrays = None if self.fanouts is None else self.nodes.arrays(folder)
            found += [(folder, arrays, rows) for rows in tables.cut(path, size)]
        return found

    def count(self, shard: PairRun) -> int:
        """Return the pairs of a run."""
        return shard[2].count

    def read(self, shard: PairRun) -> Iterator[Pair]:
        """Stream pairs."""
        folder, arrays, rows = shard
        source: WholeSet | LargeGraph
        if arrays is not None:
            source = stored.load(arrays)
        else:
            source = whole_set(folder, stamp(folder), self.preprocessing)
            if source.only is None:
                raise DataError(f"{folder.nodes} holds many graphs: pairs are predicted of the nodes of one")
        names = (self.preprocessing.names.source, self.preprocessing.names.target)
        for part in tables.read_rows(rows, names):
            cells = (map(_text, part[name].to_pylist()) for name in names)
            for a, b in zip(*cells, strict=True):
                yield Pair(below(folder, f"{a} - {b}"), (a, b), source)

    def prepare(self, record: Pair) -> PairSample:
        """Find the nodes."""
        index, found = _index(_Held(record.source)), []
        for name in record.ends:
            if name is None:
                raise BadRecord("a pair with an empty cell")
            if (number := index.get(name)) is None:
                raise BadRecord(f"the graph has no node {name!r}")
            found.append(number)
        if found[0] == found[1]:
            raise BadRecord(f"a pair of one node: {record.ends[0]!r}")
        return PairSample((found[0], found[1]), record.source)

    def collate(self, samples: Sequence[PairSample]) -> Batch:
        """Sample around the pairs, or ask the whole graph for them."""
        found: Batch = []
        for _, own in groupby(samples, key=lambda sample: id(sample.source)):
            pairs = list(own)
            source, ends = pairs[0].source, torch.tensor([pair.ends for pair in pairs])
            if isinstance(source, LargeGraph):
                found += self._sampled(source, ends)
            else:
                assert source.only is not None
                found.append(Piece(source.only._replace(pairs=ends.T), None))
        return found

    def _sampled(self, graph: LargeGraph, ends: Tensor) -> Batch:
        assert self.fanouts is not None
        graphs, places = graph.around(ends, self.fanouts, SEED, self.preprocessing.distances)
        half = len(ends) // 2
        if half and graphs.nodes > records.MOST_NODES:
            return self._sampled(graph, ends[:half]) + self._sampled(graph, ends[half:])
        return [Piece(graphs._replace(pairs=places.T), None)]


def _text(cell: Any) -> str | None:
    return None if cell is None or str(cell).strip() == "" else str(cell).strip()


class _Held:
    """A graph as the key of a cache: by what it is, not by what is in it."""

    def __init__(self, source: WholeSet | LargeGraph) -> None:
        self.source = source

    def __hash__(self) -> int:
        return id(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.source is self.source


@lru_cache(maxsize=2)
def _index(held: _Held) -> dict[str, int]:
    """The numbers of a graph's nodes by their names."""
    source = held.source
    names = source.ids.to_pylist() if isinstance(source, LargeGraph) else source.names
    return {name: number for number, name in enumerate(names)}
