"""Molecules and graphs of tables as records of prediction; nodes are in `node_records`.

Each cuts a source into shards, reads a shard's records, prepares each, and makes batches of them: `Records`
says how. What is computed of a record depends on that record alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from manyheads.core import tables
from manyheads.core.errors import BadRecord, DataError
from manyheads.core.predictor import Source
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
from manyheads.graph.tables import read_graph

MOST_NODES = 1 << 15  # that the model sees at once, if not one graph has more
WHOLE = 1 << 40  # rows: no table has more


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
    """A graph of tables that have been read, or a folder of one whose tables have not."""

    id: str
    source: GraphSet | Folder
    number: int = 0


GraphRun: TypeAlias = "tuple[tuple[tuple[Folder, bool], int, int], ...]"  # tables of many?, first, stop
GraphSample: TypeAlias = "tuple[GraphSet, int]"  # a set and the number of one of its graphs


class WholeGraphs:
    """Graphs of tables, a row each.

    Tables of one graph alone that cannot be used are a bad record; those of many are an error.
    """

    batch_size, shard_size = 128, 1024

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def shards(self, source: Source, size: int) -> list[GraphRun]:
        """Cut a source's graphs into runs of at most `size`; of tables of many the names are read."""
        counts = ((folder, _count(folder, self.preprocessing)) for folder in graph_folders(source))
        sized = (((folder, count is not None), 1 if count is None else count) for folder, count in counts)
        return list(runs(sized, size))

    def count(self, shard: GraphRun) -> int:
        """Return the graphs of a run."""
        return sum(stop - first for _, first, stop in shard)

    def read(self, shard: GraphRun) -> Iterator[GraphRecord]:
        """Stream graphs; tables of one graph are opened by `prepare`."""
        for (folder, many), first, stop in shard:
            if not many:
                name = folder.id or Path(folder.nodes).resolve().parent.name
                yield GraphRecord(name, folder)
                continue
            graphs = _tables(folder, stamp(folder), self.preprocessing)
            for number in range(first, stop):
                yield GraphRecord(below(folder, graphs.ids[number]), graphs, number)

    def prepare(self, record: GraphRecord) -> GraphSample:
        """Read a graph's tables, if they have not been read."""
        if isinstance(record.source, GraphSet):
            return record.source, record.number
        try:
            return read(record.source, self.preprocessing), 0
        except BadRecord:
            raise
        except DataError as error:
            raise BadRecord(str(error)) from None

    def collate(self, samples: Sequence[GraphSample]) -> Batch:
        """Encode graphs and put them together."""
        sizes = [int(graphs.nodes[i + 1] - graphs.nodes[i]) for graphs, i in samples]
        found = []
        for first, last in cuts(sizes, MOST_NODES):
            sets = groupby(samples[first:last], key=lambda sample: id(sample[0]))
            own = [list(each) for _, each in sets]
            parts = [each[0][0].select([number for _, number in each]) for each in own]
            found.append(_piece(GraphSet.join(parts), self.preprocessing))
        return found


def read(folder: Folder, preprocessing: Preprocessing) -> GraphSet:
    """Read a folder's tables, as the model folder says; raises DataError."""
    return read_graph(folder.nodes, folder.edges, preprocessing)


def _count(folder: Folder, preprocessing: Preprocessing) -> int | None:
    """How many graphs tables hold; None where they are of one alone, without a column of graphs."""
    path, name = Path(folder.nodes), preprocessing.names.graph
    if name not in tables.column_names(path):
        return None
    parts = (table[name] for rows in tables.cut(path, WHOLE) for table in tables.read_rows(rows, [name]))
    return len({text for part in parts for text in part.unique().to_pylist()})


def stamp(folder: Folder) -> tuple[int, ...]:
    """Differs where a table has been written again: what is kept of it no longer holds."""
    stats = [os.stat(path) for path in (folder.nodes, folder.edges)]
    return tuple(part for stat in stats for part in (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@lru_cache(maxsize=1)
def _tables(folder: Folder, stamp: tuple[int, ...], preprocessing: Preprocessing) -> GraphSet:
    """Graphs of tables of many; one folder's are kept."""
    return read(folder, preprocessing)


def below(folder: Folder, name: str) -> str:
    """Put a folder's name in front of one of its graphs' or nodes'."""
    return f"{folder.id}/{name}" if folder.id else name


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


T = TypeVar("T")


def runs(things: Iterable[tuple[T, int]], size: int) -> Iterator[tuple[tuple[T, int, int], ...]]:
    """Cut the parts of things, one after another, into runs of `size` parts.

    Args:
        things: Each, and how many parts it has.
        size: Of a run.

    Yields:
        The things of a run, each with the first of its parts and the one behind the last.

    Example:
        >>> list(runs([("a", 3), ("b", 2)], 4))
        [(('a', 0, 3), ('b', 0, 1)), (('b', 1, 2),)]
    """
    held: list[tuple[T, int, int]] = []
    room = size
    for thing, total in things:
        first = 0
        while first < total:
            stop = min(first + room, total)
            held.append((thing, first, stop))
            room -= stop - first
            first = stop
            if not room:
                yield tuple(held)
                held, room = [], size
    if held:
        yield tuple(held)
