"""torch-geometric's graphs, taken as they are and given back: `Data`, lists of them, `InMemoryDataset`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph.collection import GraphSet, Level
from manyheads.graph.splits import Parts, given

if TYPE_CHECKING:
    from torch_geometric.data import Data

log = logging.getLogger(__name__)

_USED = {
    "x",
    "edge_index",
    "edge_attr",
    "y",
    "train_mask",
    "val_mask",
    "test_mask",
    "num_nodes",
    "batch",
    "ptr",
}
_UNUSED = {
    "pos": "models take no coordinates",
    "edge_weight": "models take edge_attr",
    "face": "models take edges",
}


def read(data: Data | Iterable[Data], level: Level | None = None) -> GraphSet:
    """Take torch-geometric's graphs: their x, edge_index, edge_attr and y; edges stay as they are stored.

    Whole numbers are categories and floating point numbers features; nodes without x are all of one category.
    What else a graph has is left out, and named in the log.

    Args:
        data: One graph, or several: a list, a dataset, a `Batch`.
        level: What y belongs to: "graph" or "node"; None looks at its rows.

    Raises:
        DataError: Something is no such graph, has no edge_index, or they do not fit together.
    """
    from torch_geometric.data import Batch, Data

    if isinstance(data, Batch):
        graphs = data.to_data_list()
    else:
        graphs = [data] if isinstance(data, Data) else list(data)
    if not graphs:
        raise DataError("torch-geometric: there are no graphs")
    for i, graph in enumerate(graphs):
        if not isinstance(graph, Data):
            kind = type(graph).__name__
            raise DataError(f"torch-geometric: graph {i} is of type {kind}; only `Data` can be taken")
        if not isinstance(graph.edge_index, Tensor):
            raise DataError(f"torch-geometric: graph {i} has no edge_index")
    _tell({key for graph in graphs for key, _ in graph} - _USED)
    parts = [(_nodes(graph), graph.edge_index.long(), _plain(graph.edge_attr)) for graph in graphs]
    found = GraphSet.of(parts)
    if graphs[0].y is not None:
        level = level or _level(graphs)
        y = torch.cat([_targets(graph, level, i) for i, graph in enumerate(graphs)])
        return GraphSet(
            found.x, found.edge_index, found.nodes, found.edges, found.edge_attr, y, level
        ).check()  # fmt: skip
    return found.check()


def write(graphs: GraphSet, i: int) -> Data:
    """Return one graph of a set as torch-geometric's: x, edge_index, edge_attr, and y where there is one.

    Raises:
        IndexError: There is no such graph.
    """
    from torch_geometric.data import Data

    one = graphs.select([i])
    return Data(x=one.x, edge_index=one.edge_index, edge_attr=one.edge_attr, y=one.y)


def parts(data: Data, column: int = 0) -> Parts:
    """Return the parts that a graph's train_mask, val_mask and test_mask name: numbers of nodes.

    Args:
        data: One graph.
        column: Which split, where masks hold several.

    Raises:
        DataError: There are no such masks, or they name a node twice.
    """
    found = {}
    for name in ("train", "val", "test"):
        mask = data.get(f"{name}_mask")
        if mask is None:
            raise DataError(f"torch-geometric: the graph has no {name}_mask")
        found[name] = mask if mask.dim() == 1 else mask[:, column]
    return given(**found)


def _tell(unused: set[str]) -> None:
    if unused:
        texts = [f"{key} ({_UNUSED[key]})" if key in _UNUSED else key for key in sorted(unused)]
        log.warning("torch-geometric: left out of the graphs: %s", ", ".join(texts))


def _plain(values: Tensor | None) -> Tensor | None:
    """Categories as int64, features as float32 with a row each."""
    if values is None:
        return None
    if not values.is_floating_point():
        return values.long()
    return values.float() if values.dim() > 1 else values.float()[:, None]


def _nodes(graph: Data) -> Tensor:
    found = _plain(graph.x)
    return torch.zeros(int(graph.num_nodes or 0), 1, dtype=torch.int64) if found is None else found


def _level(graphs: Sequence[Any]) -> Level:
    """What y has a row for: one graph of several nodes with as many rows, or each graph with one."""
    ys = [torch.as_tensor(graph.y) for graph in graphs]
    if all(y.dim() == 0 or y.shape[0] == 1 for y in ys):
        return "graph"
    if all(y.dim() and y.shape[0] == graph.num_nodes for y, graph in zip(ys, graphs, strict=True)):
        return "node"
    raise DataError(
        f"torch-geometric: y {list(ys[0].shape)} of the first graph, which has {graphs[0].num_nodes} nodes, "
        "has a row neither for the graph ([1, targets]) nor for each node"
    )


def _targets(graph: Any, level: Level, i: int) -> Tensor:
    """A graph's y as float32 `[rows, targets]`."""
    if graph.y is None:
        raise DataError(f"torch-geometric: graph {i} has no y, and the first one has")
    y = torch.as_tensor(graph.y).float()
    rows = graph.num_nodes if level == "node" else 1
    y = y.reshape(1, -1) if level == "graph" and y.dim() < 2 else y
    y = y[:, None] if y.dim() == 1 else y
    if y.dim() != 2 or y.shape[0] != rows:
        raise DataError(
            f"torch-geometric: y of graph {i} is {list(graph.y.shape)}, and {rows} rows are needed"
        )
    return y
