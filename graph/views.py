"""What a model sees of a row that it predicts: its graph, where in it the row is, the names of its nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.core.errors import BadRecord, UsageError
from manyheads.core.predictor import Bad, Source
from manyheads.graph.graphs import Graphs
from manyheads.graph.molecules import parse
from manyheads.graph.node_records import SEED, Node, WholeSet
from manyheads.graph.pair_records import Pair
from manyheads.graph.predictor import Predictor
from manyheads.graph.sources import Smiles
from manyheads.graph.stored import LargeGraph


@dataclass(frozen=True)
class View:
    """A row and its graph.

    Args:
        id: The row's.
        graphs: One graph, as the model takes it.
        row: Which of the model's outputs for this graph is the row's.
        names: The nodes' names; None where they have none but their numbers.
        about: The nodes that the row is about; none where it is about the graph.
        molecule: The molecule, as rdkit has it, of a SMILES.
        shared: Whether other rows are of the same graph.
    """

    id: str
    graphs: Graphs
    row: int = 0
    names: Sequence[str] | None = None
    about: tuple[int, ...] = ()
    molecule: Any = None
    shared: bool = False


def views(
    predictor: Predictor, source: Source, ids: Collection[str] = (), most: int | None = None
) -> Iterator[View | Bad]:
    """Yield the rows of a source, each with its graph; rows that cannot be used are told.

    Args:
        predictor: How the source is read.
        source: As the predictor takes it.
        ids: The rows that are wanted; none for the first ones.
        most: How many, where none are named.

    Raises:
        UsageError: There is no row of an id.
    """
    left, count = set(ids), 0
    for shard in predictor.shards(source, 1 << 40):
        for record in predictor.read(shard):
            if (ids and not left) or (not ids and count == most):
                return
            if ids and record.id not in left:
                continue
            left.discard(record.id)
            count += 1
            try:
                yield view(predictor, record)
            except BadRecord as error:
                yield Bad(record.id, str(error))
    if left:
        raise UsageError(f"the input has no row {sorted(left)[0]!r}")


def view(predictor: Predictor, record: Any) -> View:
    """Return what the model sees of a record.

    Raises:
        BadRecord: It cannot be used, and why.
    """
    sample = predictor.prepare(record)
    ((graphs, rows),) = predictor.collate([sample])
    row = 0 if rows is None else int(rows[0])
    if isinstance(record, Smiles):
        return View(record.id, graphs, row, None, (), parse(record.text))
    if isinstance(record, Node):
        names = _names(predictor, record.source, [record.number])
        return View(record.id, graphs, row, names, (row,), None, isinstance(record.source, WholeSet))
    if isinstance(record, Pair):
        assert graphs.pairs is not None
        names = _names(predictor, record.source, sample.ends)
        ends = tuple(graphs.pairs[:, 0].tolist())
        return View(record.id, graphs, row, names, ends, None, isinstance(record.source, WholeSet))
    whole, number = sample
    first, last = (int(each) for each in whole.nodes[number : number + 2])
    return View(record.id, graphs, row, None if whole.node_ids is None else whole.node_ids[first:last])


def _names(predictor: Predictor, source: WholeSet | LargeGraph, numbers: Sequence[int]) -> Sequence[str]:
    """The names of the nodes of what the model sees of some nodes."""
    if isinstance(source, LargeGraph):
        fanouts = predictor.preprocessing.fanouts
        assert fanouts is not None
        nodes = source.sampled(torch.tensor([numbers]), fanouts, SEED).nodes
        return list(source.ids.take(nodes.numpy()).to_pylist())
    bounds = source.graphs.nodes
    owner = int(torch.searchsorted(bounds, numbers[0], right=True)) - 1
    return source.names[int(bounds[owner]) : int(bounds[owner + 1])]


def hops_from(edge_index: Tensor, nodes: int, first: Sequence[int], most: int) -> Tensor:
    """Return each node's steps from some nodes, edges taken in both directions; `most` + 1 beyond `most`.

    Shape:
        edge_index `[2, E]`; the result `[nodes]`.
    """
    steps = torch.full((nodes,), most + 1)
    steps[list(first)] = 0
    source, target = torch.cat([edge_index, edge_index.flip(0)], 1).long()
    for step in range(1, most + 1):
        reached = target[steps[source] == step - 1]
        steps[reached] = steps[reached].clamp(max=step)
    return steps
