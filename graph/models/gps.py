"""GPS: messages between neighbours and attention among all nodes, side by side. arXiv 2205.12454.

A layer's parameters have the names of the published code (rampasek/GraphGPS); `from_torch_geometric` renames
those of torch-geometric's `GPSConv`. Attention is packed: torch-geometric and the published code pad every
batch to its largest graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.graph.graphs import Graphs, Padding, graph_ids
from manyheads.graph.models.attention import GraphAttention
from manyheads.graph.models.gated_gcn import GatedGCNLayer
from manyheads.graph.models.inputs import (
    Inputs,
    MLPReadout,
    Readout,
    batch_norm,
    check_sizes,
    edge_layer,
    embed_edges,
    encodings,
    inputs,
    node_layer,
    read_out,
)

Local = Literal["gine", "gated_gcn", "none"]
Norm = Literal["batch", "graph", "none"]
Activation = Literal["relu", "gelu"]
LOCALS, NORMS, ACTIVATIONS = ("gine", "gated_gcn", "none"), ("batch", "graph", "none"), ("relu", "gelu")


class GINELayer(nn.Module):
    """`nn((1 + eps) x_i + sum_j relu(x_j + e_ij))`, as torch-geometric's GINEConv with two linear layers.

    Shape:
        x `[N, dim]`; e `[E, dim]`; the result `[N, dim]`.

    Source:
        Hu et al. 2019, arXiv 1905.12265.
    """

    eps: Tensor

    def __init__(self, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(dim, dim), activation, nn.Linear(dim, dim))
        self.register_buffer("eps", torch.zeros(1))

    def forward(self, x: Tensor, e: Tensor, edge_index: Tensor) -> Tensor:
        """Pass messages along the edges."""
        source, target = edge_index
        mixed = torch.zeros_like(x).index_add(0, target, F.relu(x[source] + e))
        first, inner, last = self.nn
        return project(last, inner(project(first, (1 + self.eps) * x + mixed)))


class GraphNorm(nn.Module):
    """Layer norm over all nodes and channels of a graph (torch-geometric's LayerNorm in its usual mode).

    Shape:
        h `[N, dim]`; graph, each node's, `[N]`; the result `[N, dim]`.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, h: Tensor, graph: Tensor, count: int) -> Tensor:
        """Normalise; `count` is the number of graphs."""
        sizes = torch.bincount(graph, minlength=count).clamp(min=1)  # [B]

        def mean(x: Tensor) -> Tensor:
            total = x.new_zeros(count).index_add(0, graph, x.mean(1))
            return (total / sizes)[graph, None]

        centred = h - mean(h)
        return centred * (mean(centred.square()) + self.eps).rsqrt() * self.weight + self.bias


class GPSLayer(nn.Module):
    """Messages and attention side by side, each with its residual and norm; then a feed-forward net.

    Args:
        dim: Width of nodes and edges.
        num_heads: Heads.
        local: "gine", "gated_gcn" (which updates the edges) or "none".
        norm: "batch", "graph" (over all nodes and channels of a graph) or "none".
        activation: "relu" or "gelu".
        dropout: Probability, in training, of what is added.
        attn_dropout: Probability that an attention weight is dropped, in training; attention is padded then.

    Shape:
        h `[N, dim]`; e `[E, dim]`; the results likewise.

    Raises:
        UsageError: A size does not fit or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        local: Local = "gine",
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _known("local", local, LOCALS)
        _known("norm", norm, NORMS)
        _known("activation", activation, ACTIVATIONS)
        self.local, self.norm, self.activation, self.dropout = local, norm, activation, dropout
        inner = nn.ReLU() if activation == "relu" else nn.GELU()
        self.local_model: nn.Module | None = None
        if local != "none":
            self.local_model = GINELayer(dim, inner) if local == "gine" else GatedGCNLayer(dim, dropout)
        self.self_attn = GraphAttention(dim, num_heads, attn_dropout)
        self.ff_linear1 = nn.Linear(dim, dim * 2)
        self.ff_linear2 = nn.Linear(dim * 2, dim)
        for name in ("norm1_local", "norm1_attn", "norm2"):
            if norm != "none" and not (name == "norm1_local" and local == "none"):
                self.add_module(name, nn.BatchNorm1d(dim) if norm == "batch" else GraphNorm(dim))

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        edge_index: Tensor,
        starts: Tensor,
        *,
        bias: Tensor | None = None,
        padded: Padding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give the nodes' new states, and the edges'; `bias` and `padded` as `GraphAttention`."""
        graph = graph_ids(starts, h.shape[0]) if self.norm == "graph" else None
        count = starts.shape[0] - 1
        attended = self.self_attn(h, starts, bias=bias, padded=padded)
        total = self._normed("norm1_attn", h + self._drop(attended), graph, count)
        if self.local_model is not None:
            mixed = self.local_model(h, e, edge_index)
            if isinstance(mixed, tuple):  # the residual is in there
                mixed, e = mixed
            else:
                mixed = h + self._drop(mixed)
            total = self._normed("norm1_local", mixed, graph, count) + total
        y = project(self.ff_linear1, total, relu=self.activation == "relu")
        y = y if self.activation == "relu" else F.gelu(y)
        y = project(self.ff_linear2, self._drop(y))
        return self._normed("norm2", total + self._drop(y), graph, count), e

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _normed(self, name: str, x: Tensor, graph: Tensor | None, count: int) -> Tensor:
        if self.norm == "none":
            return x
        layer = self.get_submodule(name)
        return batch_norm(layer, x) if graph is None else cast(Tensor, layer(x, graph, count))


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UsageError(f"gps: no {what} {name!r} (there are {', '.join(names)})")


_RENAMED = {
    "conv.": "local_model.",
    "attn.": "self_attn.",
    "mlp.0.": "ff_linear1.",
    "mlp.3.": "ff_linear2.",
    "norm1.module.": "norm1_local.",  # batch norm
    "norm2.module.": "norm1_attn.",
    "norm3.module.": "norm2.",
    "norm1.": "norm1_local.",  # the others
    "norm2.": "norm1_attn.",
    "norm3.": "norm2.",
}


def from_torch_geometric(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a torch-geometric `GPSConv` around a `GINEConv` to a `GPSLayer`'s.

    Keys it does not know stay as they are, for strict loading to refuse.
    """
    found = {}
    for key, tensor in state.items():
        old = next((old for old in _RENAMED if key.startswith(old)), "")
        found[_RENAMED.get(old, "") + key.removeprefix(old)] = tensor
    return found


class GPS(nn.Module):
    """GPS layers between an embedding and a readout.

    Args:
        of: What nodes and edges are made of.
        outputs: Numbers given out for each node, pair or graph.
        hidden_dim: Width, a multiple of n_heads.
        L: Layers.
        n_heads: Heads.
        local: "gine", "gated_gcn" or "none".
        readout: "node", "pair", "mean", "sum" or "max".
        norm: "batch", "graph" or "none".
        encoding_width: Of the nodes' width, the part that the encodings fill.
        dropout: Probability, in training.
        attn_dropout: Probability that an attention weight is dropped, in training.
    """

    def __init__(
        self,
        of: Inputs,
        outputs: int,
        hidden_dim: int,
        L: int,
        n_heads: int,
        local: Local,
        readout: Readout,
        norm: Norm,
        encoding_width: int,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.of, self.readout = of, readout
        width = encoding_width if of.encoding_dim else 0
        self.node = node_layer(of, hidden_dim - width)
        self.edge = edge_layer(of, hidden_dim)
        self.encoding_norm = nn.BatchNorm1d(of.encoding_dim) if width else None
        self.encoding = nn.Linear(of.encoding_dim, width) if width else None
        self.layers = nn.ModuleList(
            GPSLayer(hidden_dim, n_heads, local=local, norm=norm, dropout=dropout, attn_dropout=attn_dropout)
            for _ in range(L)
        )
        self.head = MLPReadout(hidden_dim, outputs)

    def embed(self, graphs: Graphs) -> Tensor:
        """Give the nodes' states behind the last layer, `[N, hidden_dim]`."""
        h = project(self.node, graphs.x)
        if self.encoding is not None and self.encoding_norm is not None:
            given = batch_norm(self.encoding_norm, encodings(self.of, graphs, h))
            h = torch.cat([h, project(self.encoding, given)], 1)
        e = embed_edges(self.edge, self.of, graphs, h)
        for layer in self.layers:
            h, e = layer(h, e, graphs.edge_index, graphs.starts)
        return h

    def forward(self, graphs: Graphs) -> Tensor:
        """Score: `[N, outputs]`, `[P, outputs]` or `[B, outputs]` by the readout.

        Raises:
            ValueError: The batch lacks what the model needs, or a shape is wrong.
        """
        return cast(Tensor, self.head(read_out(self.embed(graphs), graphs, self.readout)))


def gps(
    outputs: int,
    node_types: list[int] | None = None,
    node_features: int = 0,
    edge_types: list[int] | None = None,
    edge_features: int = 0,
    encoding_dim: int = 0,
    encoding_width: int = 28,
    hidden_dim: int = 64,
    L: int = 10,
    n_heads: int = 4,
    local: Local = "gine",
    readout: Readout = "sum",
    norm: Norm = "batch",
    dropout: float = 0.0,
    attn_dropout: float = 0.0,
) -> GPS:
    """Build a GPS of any size.

    Args:
        outputs: Numbers given out for each node, pair or graph.
        node_types: Categories of each of the nodes' columns; or
        node_features: features of a node.
        edge_types: Categories of each of the edges' columns; or
        edge_features: features of an edge. With neither, all edges are alike.
        encoding_dim: Columns of the nodes' encodings (random walks, as published on ZINC: 20); 0 for none.
        encoding_width: Of hidden_dim, the part that the encodings fill.
        hidden_dim: Width, a multiple of n_heads.
        L: Layers.
        n_heads: Heads.
        local: Messages by "gine", "gated_gcn" or "none".
        readout: "node", "pair" (each of the batch's pairs of nodes), or "mean", "sum", "max" over a graph's.
        norm: "batch", "graph" (over all nodes and channels of a graph) or "none".
        dropout: Probability, in training.
        attn_dropout: Probability that an attention weight is dropped, in training; attention is padded then.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Source:
        arXiv 2205.12454.

    Example:
        >>> model = gps(outputs=1, node_types=[28], edge_types=[4], encoding_dim=20)
    """
    sizes = {"outputs": outputs, "hidden_dim": hidden_dim, "L": L, "n_heads": n_heads}
    chances = {"dropout": dropout, "attn_dropout": attn_dropout}
    check_sizes("gps", sizes, readout=readout, hidden_dim=hidden_dim, **chances)
    of = inputs(node_types, node_features, edge_types, edge_features, encoding_dim)
    if encoding_dim and not 0 < encoding_width < hidden_dim:
        raise UsageError(f"gps: encoding_width must be from 1 to {hidden_dim - 1}, not {encoding_width}")
    if local == "none" and of.edges:
        raise UsageError("gps: without local messages there is no place for edge categories or features")
    return GPS(
        of, outputs, hidden_dim, L, n_heads, local, readout, norm, encoding_width, dropout, attn_dropout
    )


def gps_zinc(encoding_dim: int = 20, dropout: float = 0.0, attn_dropout: float = 0.5) -> GPS:
    """Build the model of ZINC: 423,717 parameters, as published; GINE, 28 atom types, 4 bond types.

    Args:
        encoding_dim: Steps of the random walks; 0 for none.
        dropout: Probability, in training.
        attn_dropout: Probability that an attention weight is dropped, in training.
    """
    return gps(
        1, node_types=[28], edge_types=[4], encoding_dim=encoding_dim, dropout=dropout,
        attn_dropout=attn_dropout,
    )  # fmt: skip
