"""Message passing networks on torch-geometric's layers: the baselines that a graph transformer has to beat.

GCN (arXiv 1609.02907), GINE (1905.12265), the residual gated form of torch-geometric (1711.07553), and
GatedGCN with edges that are carried along (2003.00982), which torch-geometric does not have. Tuned as arXiv
2406.08993 found it to matter: residuals, a norm, dropout, in every layer.
"""

from __future__ import annotations

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.graph.graphs import Graphs
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

Conv = Literal["gcn", "gine", "res_gated", "gated_gcn"]


def _conv(conv: Conv, dim: int, dropout: float) -> nn.Module:
    from torch_geometric.nn import GCNConv, GINEConv, ResGatedGraphConv

    if conv == "gcn":
        return cast(nn.Module, GCNConv(dim, dim))
    if conv == "gine":
        inner = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        return cast(nn.Module, GINEConv(inner))
    if conv == "res_gated":
        return cast(nn.Module, ResGatedGraphConv(dim, dim, edge_dim=dim))
    return GatedGCNLayer(dim, dropout)


class MessagePassingNet(nn.Module):
    """Rounds of messages between an embedding and a readout.

    Args:
        of: What nodes and edges are made of.
        outputs: Numbers given out for each node, pair or graph.
        conv: "gcn", "gine", "res_gated" or "gated_gcn".
        hidden_dim: Width.
        L: Rounds.
        readout: "node", "pair", "mean", "sum" or "max".
        dropout: Probability, in training.
    """

    def __init__(
        self,
        of: Inputs,
        outputs: int,
        conv: Conv,
        hidden_dim: int,
        L: int,
        readout: Readout,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.of, self.conv, self.readout, self.dropout = of, conv, readout, dropout
        self.node = node_layer(of, hidden_dim)
        self.edge = None if conv == "gcn" else edge_layer(of, hidden_dim)
        self.encoding = nn.Linear(of.encoding_dim, hidden_dim) if of.encoding_dim else None
        self.layers = nn.ModuleList(_conv(conv, hidden_dim, dropout) for _ in range(L))
        bare = conv != "gated_gcn"  # that one has its own norms
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_dim) for _ in range(L if bare else 0))
        self.head = MLPReadout(hidden_dim, outputs)

    def embed(self, graphs: Graphs) -> Tensor:
        """Give the nodes' states behind the last round, `[N, hidden_dim]`."""
        h = project(self.node, graphs.x)
        if self.encoding is not None:
            h = h + project(self.encoding, encodings(self.of, graphs, h))
        e = None if self.edge is None else embed_edges(self.edge, self.of, graphs, h)
        edge_index = graphs.edge_index.long()
        for i, layer in enumerate(self.layers):
            if self.conv == "gated_gcn":
                h, e = layer(h, e, edge_index)
                continue
            y = layer(h, edge_index) if e is None else layer(h, edge_index, e)
            h = h + F.dropout(F.relu(batch_norm(self.norms[i], y)), self.dropout, self.training)
        return h

    def forward(self, graphs: Graphs) -> Tensor:
        """Score: `[N, outputs]`, `[P, outputs]` or `[B, outputs]` by the readout.

        Raises:
            ValueError: The batch lacks what the model needs, or a shape is wrong.
        """
        return cast(Tensor, self.head(read_out(self.embed(graphs), graphs, self.readout)))


class KipfGCN(nn.Module):
    """Graph convolutions and nothing else, as on the citation graphs: dropout, convolution, ReLU, and again.

    Args:
        node_features: Features of a node.
        outputs: Classes.
        hidden_dim: Width between the convolutions.
        L: Convolutions.
        dropout: Probability, in training, of what every convolution takes in.

    Source:
        Kipf and Welling 2017, arXiv 1609.02907.
    """

    def __init__(self, node_features: int, outputs: int, hidden_dim: int, L: int, dropout: float) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        widths = (node_features, *(hidden_dim,) * (L - 1), outputs)
        self.layers = nn.ModuleList(GCNConv(widths[i], widths[i + 1]) for i in range(L))
        self.dropout = dropout

    def forward(self, graphs: Graphs) -> Tensor:
        """Score every node, `[N, outputs]`."""
        h, edge_index = graphs.x, graphs.edge_index.long()
        for i, layer in enumerate(self.layers):
            h = F.dropout(F.relu(h) if i else h, self.dropout, self.training)
            h = layer(h, edge_index)
        return h


def kipf_gcn(
    node_features: int, outputs: int, hidden_dim: int = 16, L: int = 2, dropout: float = 0.5
) -> KipfGCN:
    """Build the GCN of the citation graphs.

    Args:
        node_features: Features of a node; rows that sum to one, as published.
        outputs: Classes.
        hidden_dim: Width between the convolutions.
        L: Convolutions.
        dropout: Probability, in training, of what every convolution takes in.

    Raises:
        UsageError: A size is not positive, the dropout is no probability.

    Source:
        arXiv 1609.02907.

    Example:
        >>> model = kipf_gcn(node_features=1433, outputs=7)
    """
    sizes = {"node_features": node_features, "outputs": outputs, "hidden_dim": hidden_dim, "L": L}
    check_sizes("kipf_gcn", sizes, dropout=dropout)
    return KipfGCN(node_features, outputs, hidden_dim, L, dropout)


def message_passing(
    conv: Conv,
    outputs: int,
    node_types: list[int] | None = None,
    node_features: int = 0,
    edge_types: list[int] | None = None,
    edge_features: int = 0,
    encoding_dim: int = 0,
    hidden_dim: int = 64,
    L: int = 4,
    readout: Readout = "mean",
    dropout: float = 0.0,
) -> MessagePassingNet:
    """Build a message passing network of any size.

    Args:
        conv: "gcn" (which looks at no edge categories or features), "gine", "res_gated" or "gated_gcn".
        outputs: Numbers given out for each node, pair or graph.
        node_types: Categories of each of the nodes' columns; or
        node_features: features of a node.
        edge_types: Categories of each of the edges' columns; or
        edge_features: features of an edge. With neither, all edges are alike.
        encoding_dim: Columns of the nodes' encodings; 0 for none.
        hidden_dim: Width.
        L: Rounds of messages.
        readout: "node", "pair" (each of the batch's pairs of nodes), or "mean", "sum", "max" over a graph's.
        dropout: Probability, in training.

    Raises:
        UsageError: A size is not positive, an option is unknown.

    Example:
        >>> model = message_passing("gine", outputs=1, node_types=[28], edge_types=[4])
    """
    sizes = {"outputs": outputs, "hidden_dim": hidden_dim, "L": L}
    check_sizes(conv, sizes, readout=readout, hidden_dim=hidden_dim, dropout=dropout)
    if conv not in ("gcn", "gine", "res_gated", "gated_gcn"):
        raise UsageError(f"no message passing {conv!r} (there are gcn, gine, res_gated, gated_gcn)")
    of = inputs(node_types, node_features, edge_types, edge_features, encoding_dim)
    return MessagePassingNet(of, outputs, conv, hidden_dim, L, readout, dropout)
