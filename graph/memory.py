"""Graphs that are in memory already: what they are made of, their targets and their parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph import torch_geometric
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.preprocessing import Preprocessing, Target, TargetKind
from manyheads.graph.splits import Parts, Split
from manyheads.graph.targets import divided

if TYPE_CHECKING:
    from torch_geometric.data import Data


def describe(graphs: GraphSet) -> Preprocessing:
    """Say what graphs in memory are made of: categories as whole numbers, or features as they are."""

    def columns(part: Tensor, name: str) -> tuple[Column, ...]:
        part = part[:, None] if part.dim() == 1 else part
        if part.is_floating_point():
            return (Column(name, size=part.shape[1]),)
        most = part.max(0).values.tolist() if len(part) else [0] * part.shape[1]
        names = [name] if len(most) == 1 else [f"{name}_{i}" for i in range(len(most))]
        return tuple(Column(n, tuple(map(str, range(m + 1)))) for n, m in zip(names, most, strict=True))

    edges = () if graphs.edge_attr is None else columns(graphs.edge_attr, "edge_attr")
    return Preprocessing(
        "tables", node_columns=columns(graphs.x, "x"), edge_columns=edges, directed=_directed(graphs)
    )


def _directed(graphs: GraphSet) -> bool:
    """Whether an edge is there without the one back."""
    first = torch.repeat_interleave(graphs.nodes[:-1], graphs.edges.diff())
    source, target = graphs.edge_index + first
    count = len(graphs.x)
    return not torch.equal((source * count + target).unique(), (target * count + source).unique())


def take(dataset: Data | Iterable[Data], kind: TargetKind, split: Split) -> tuple[GraphSet, Target, Parts]:
    """Return torch-geometric's graphs, what their targets are, and the parts.

    Args:
        dataset: One graph, or several.
        kind: What the targets are.
        split: "standard" takes the masks of one graph, else is "random".

    Raises:
        DataError: There are no targets, or they are not of this kind.
    """
    from torch_geometric.data import Data

    listed = [dataset] if isinstance(dataset, Data) else list(dataset)
    graphs = torch_geometric.read(listed)
    if graphs.y is None:
        raise DataError("torch-geometric: the graphs have no y")
    y = graphs.y
    target = _target(y, kind)
    single = graphs.level == "node" and graphs.whole
    if single and split.kind == "standard" and "train_mask" in listed[0]:
        return graphs, target, torch_geometric.parts(listed[0])
    if split.kind == "standard":
        split = replace(split, kind="random")
    if graphs.level == "node" and not single:
        return graphs, target, split.divide(len(graphs))

    def divide(known: Tensor) -> Parts:
        return split.divide(len(known), classes=y[known, 0] if kind == "classification" else None)

    return graphs, target, divided(y, divide)


def _target(y: Tensor, kind: TargetKind) -> Target:
    known = y[~y.isnan()]
    if kind == "classification":
        if y.shape[1] != 1 or not len(known) or bool((known < 0).any()) or bool((known % 1 != 0).any()):
            raise DataError("torch-geometric: classes are whole numbers from 0 on, one a row")
        return Target(kind, ("class",), tuple(str(i) for i in range(int(known.max()) + 1)))
    if kind == "multilabel" and not bool(((known == 0) | (known == 1)).all()):
        raise DataError("torch-geometric: labels are 0, 1 or NaN")
    return Target(kind, tuple(f"y_{i}" for i in range(y.shape[1])) if y.shape[1] > 1 else ("y",))
