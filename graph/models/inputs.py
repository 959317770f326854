"""What the graph models share at their two ends: how nodes and edges come in, and how answers come out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core import sizes
from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.graph.graphs import Graphs

Readout = Literal["node", "pair", "mean", "sum", "max"]
READOUTS = ("node", "pair", "mean", "sum", "max")


@dataclass(frozen=True)
class Inputs:
    """What a model's nodes and edges are made of.

    Args:
        node_types: How many categories each of the nodes' columns has; empty where nodes have features.
        node_features: Features of a node; 0 where nodes have categories.
        edge_types: As node_types.
        edge_features: As node_features; edges with neither are all alike.
        encoding_dim: Columns of the nodes' encodings; 0 for none.

    Raises:
        UsageError: Nodes, or edges, with both or (nodes) with neither; a size that is not positive.
    """

    node_types: tuple[int, ...] = ()
    node_features: int = 0
    edge_types: tuple[int, ...] = ()
    edge_features: int = 0
    encoding_dim: int = 0

    def __post_init__(self) -> None:
        if bool(self.node_types) == bool(self.node_features):
            raise UsageError("a graph model's nodes have either node_types or node_features: give one")
        if self.edge_types and self.edge_features:
            raise UsageError("a graph model's edges have either edge_types or edge_features: give one")
        sizes = (*self.node_types, *self.edge_types)
        if min(sizes, default=1) < 1 or min(self.node_features, self.edge_features, self.encoding_dim) < 0:
            raise UsageError(f"a graph model's sizes must be positive: {self}")

    @property
    def edges(self) -> bool:
        """Whether edges have categories or features."""
        return bool(self.edge_types) or bool(self.edge_features)


def inputs(
    node_types: list[int] | None,
    node_features: int,
    edge_types: list[int] | None,
    edge_features: int,
    encoding_dim: int,
) -> Inputs:
    """Return the inputs of a builder's flat arguments; as `Inputs`."""
    return Inputs(
        tuple(node_types or ()), node_features, tuple(edge_types or ()), edge_features, encoding_dim
    )


class Categories(nn.Module):
    """The sum of one embedding a column; all are in one table, one after the other.

    With one column it is `nn.Embedding`, by name and shape too.

    Args:
        sizes: Categories of each column.
        dim: Width.

    Shape:
        x: `[N]` (one column) or `[N, columns]`; the result `[N, dim]`.

    Raises:
        TypeError: x is not of whole numbers.
        ValueError: Another number of columns.
        IndexError: A category that is not there (on a CPU).
    """

    first: Tensor

    def __init__(self, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))
        nn.init.normal_(self.weight)
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        self.register_buffer("first", torch.tensor(first), persistent=False)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        """Embed."""
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"categories must be whole numbers, not {x.dtype}")
        x = x[:, None] if x.dim() == 1 else x
        if x.shape[1:] != (len(self.sizes),):
            raise ValueError(f"categories must have {len(self.sizes)} columns, not {list(x.shape)}")
        if x.is_cpu and x.numel() and not torch.compiler.is_compiling():
            self._check(x)
        return F.embedding(x.long() + self.first, self.weight).sum(1)

    def _check(self, x: Tensor) -> None:
        # a number too large for its column would quietly be the next column's
        low, high = x.aminmax(dim=0)
        for column, size in enumerate(self.sizes):
            least, most = int(low[column]), int(high[column])
            if least < 0 or most >= size:
                wrong = least if least < 0 else most
                raise IndexError(f"category {wrong} of column {column}, which has {size}")


def node_layer(of: Inputs, dim: int) -> nn.Module:
    """The layer that brings nodes to a width."""
    return Categories(of.node_types, dim) if of.node_types else nn.Linear(of.node_features, dim)


def edge_layer(of: Inputs, dim: int) -> nn.Module:
    """The layer that brings edges to a width; edges without anything are a one each."""
    if of.edge_types:
        return Categories(of.edge_types, dim)
    return nn.Linear(of.edge_features or 1, dim)


def embed_edges(layer: nn.Module, of: Inputs, graphs: Graphs, like: Tensor) -> Tensor:
    """Bring a batch's edges to a width, `[E, dim]`.

    Raises:
        ValueError: The model has edge categories or features, and the batch has none.
    """
    if not of.edges:
        return project(layer, like.new_ones(graphs.edge_index.shape[1], 1))
    return project(layer, wanted(graphs.edge_attr, "edge_attr"))


def wanted(found: Tensor | None, name: str) -> Tensor:
    """Return a part of the batch that the model cannot do without.

    Raises:
        ValueError: It is not there.
    """
    if found is None:
        raise ValueError(f"this graph model needs {name}, and the batch has none")
    return found


def encodings(of: Inputs, graphs: Graphs, like: Tensor) -> Tensor:
    """Return the batch's encodings, in the dtype of the hidden states.

    Raises:
        ValueError: There are none, or of another number of columns.
    """
    found = wanted(graphs.encoding, "encoding")
    if found.shape != (graphs.nodes, of.encoding_dim):
        raise ValueError(
            f"encoding must be {[graphs.nodes, of.encoding_dim]}, not {list(found.shape)}"
        )  # fmt: skip
    return found.to(like.dtype)


class MLPReadout(nn.Module):
    """Three linear layers, each but the last half as wide as the one before.

    Shape:
        x: `[..., dim]`; the result `[..., outputs]`.

    Source:
        Dwivedi et al. 2020 (arXiv 2003.00982); parameters are named as theirs.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        widths = (dim, dim // 2, dim // 4, outputs)
        self.FC_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, a ReLU between."""
        *first, last = self.FC_layers
        for layer in first:
            x = project(layer, x, relu=True)
        return project(last, x)


def check_sizes(
    name: str, positive: dict[str, int], *, readout: str = "node", hidden_dim: int = 4, **chances: float
) -> None:
    """Refuse sizes that are not positive, a readout that is not there, chances that are none.

    Raises:
        UsageError: Says which, and what it is.
    """
    sizes.check_sizes(name, positive, **chances)
    if readout not in READOUTS:
        raise UsageError(f"{name}: no readout {readout!r} (there are {', '.join(READOUTS)})")
    if hidden_dim < 4:
        raise UsageError(f"{name}: hidden_dim must be at least 4, not {hidden_dim}")


def read_out(h: Tensor, graphs: Graphs, how: Readout) -> Tensor:
    """From the nodes' states to what is scored.

    Args:
        h: States of the nodes.
        graphs: The batch.
        how: "node": every node by itself. "pair": the product of the two nodes of each of `graphs.pairs`.
            "mean", "sum", "max": over each graph's nodes; a graph without nodes gives zeros.

    Shape:
        h `[N, dim]`; the result `[N, dim]`, `[P, dim]` or `[B, dim]`.
    """
    if how == "node":
        return h
    if how == "pair":
        first, second = wanted(graphs.pairs, "pairs")
        return h[first] * h[second]
    sizes = graphs.sizes.long()
    if torch.compiler.is_exporting():  # other runtimes have no reduction over segments
        return _read_out_densely(h, graphs.starts.long(), sizes, how)
    if how == "max":
        found = torch.segment_reduce(h, "max", lengths=sizes, axis=0)
        return found.masked_fill((sizes == 0)[:, None], 0.0)
    total = torch.segment_reduce(h, "sum", lengths=sizes, axis=0)
    return total if how == "sum" else total / sizes.clamp(min=1)[:, None]


def _read_out_densely(h: Tensor, starts: Tensor, sizes: Tensor, how: Readout) -> Tensor:
    """Read out by the table `[B, N]` of which node is whose."""
    place = torch.arange(h.shape[0], device=h.device)
    own = (place >= starts[:-1, None]) & (place < starts[1:, None])
    if how == "max":
        found = h.masked_fill(~own[..., None], -torch.inf).amax(1)
        return found.masked_fill((sizes == 0)[:, None], 0.0)
    total = own.to(h.dtype) @ h
    return total if how == "sum" else total / sizes.clamp(min=1)[:, None]


def batch_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Batch norm that takes any number of rows.

    A training batch of one row, or none, has no variance: the running statistics stand in, unchanged.
    """
    assert isinstance(layer, nn.BatchNorm1d)
    if x.shape[0] > 1 or not layer.training:
        return cast(Tensor, layer(x))
    return F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )  # fmt: skip
