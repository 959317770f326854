"""URPE: attention weights are multiplied, after the softmax, by a factor of the distance. arXiv 2205.13401.

A bias of the distance in the softmax alone cannot tell some graphs apart that `softmax(QK + B) * C` can. The
released code (lsj2408/URPE) is of sequences: a layer's parameters have its names. That of graphs was never
released: here B and C are tables by shortest path, shared by all layers; an edge adds its own bias to its
pair; nodes know their degree.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import attention
from manyheads.core.products import project
from manyheads.graph.encodings import degree
from manyheads.graph.graphs import Graphs, pad_pairs, padding
from manyheads.graph.models.inputs import (
    Inputs,
    MLPReadout,
    Readout,
    check_sizes,
    edge_layer,
    encodings,
    inputs,
    node_layer,
    read_out,
    wanted,
)

DEGREES = 16  # from here on all degrees are one


class UrpeAttention(nn.Module):
    """`(softmax(q k / sqrt(d) + bias) * factor) v`, with projections; weights need not sum to one.

    Shape:
        x `[B, n, dim]`; mask `[B, n]`, True where there is a token; bias and factor broadcast to
        `[B, heads, n, n]`; the result `[B, n, dim]`.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise UsageError(f"urpe: the width {dim} is not a multiple of {num_heads} heads")
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        """Attend to all tokens of the row."""
        q, k, v = (
            project(f, x).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(
            q,
            k,
            v,
            bias=bias,
            mask=mask[:, None, None],
            post_scale=factor,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return project(self.out_proj, out.flatten(2))


class UrpeLayer(nn.Module):
    """Attention and a feed-forward net, each with a residual and a layer norm.

    Args:
        dim: Width.
        ffn_dim: Width within the feed-forward net.
        num_heads: Heads.
        norm_first: Norms before attention and net; otherwise behind the residuals, as the sequence code does.
        dropout: Probability, in training, of what is added.
        attn_dropout: Probability that an attention weight is dropped, in training.

    Shape:
        As `UrpeAttention`.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        *,
        norm_first: bool = True,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = UrpeAttention(dim, num_heads, attn_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.norm_first, self.dropout = norm_first, dropout

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        """Give the tokens' new states."""
        first, last = self.self_attn_layer_norm, self.final_layer_norm
        if self.norm_first:
            x = x + self._drop(self.self_attn(first(x), mask, bias, factor))
            return x + self._drop(project(self.fc2, F.gelu(project(self.fc1, last(x)))))
        x = first(x + self._drop(self.self_attn(x, mask, bias, factor)))
        return cast(Tensor, last(x + self._drop(project(self.fc2, F.gelu(project(self.fc1, x))))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Urpe(nn.Module):
    """Every node attends to all of its graph, by shortest path; then nodes, pairs or whole graphs are scored.

    Args:
        of: What nodes and edges are made of.
        outputs: Numbers given out for each node, pair or graph.
        hidden_dim: Width, a multiple of n_heads.
        ffn_dim: Width within the feed-forward nets.
        L: Layers.
        n_heads: Heads.
        max_distance: As the batch's distances were made with (`manyheads.graph.encodings.shortest_paths`).
        readout: "node", "pair", "mean", "sum" or "max".
        dropout: Probability, in training.
        attn_dropout: Probability that an attention weight is dropped, in training.
    """

    def __init__(
        self,
        of: Inputs,
        outputs: int,
        hidden_dim: int,
        ffn_dim: int,
        L: int,
        n_heads: int,
        max_distance: int,
        readout: Readout,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.of, self.readout, self.n_heads, self.max_distance = of, readout, n_heads, max_distance
        self.node = node_layer(of, hidden_dim)
        self.degree = nn.Embedding(DEGREES + 1, hidden_dim)
        self.encoding = nn.Linear(of.encoding_dim, hidden_dim) if of.encoding_dim else None
        self.edge_bias = edge_layer(of, n_heads) if of.edges else None
        self.bias = nn.Parameter(torch.zeros(max_distance + 2, n_heads))
        # ones: it begins as attention with a bias
        self.factor = nn.Parameter(torch.ones(max_distance + 2, n_heads))
        self.layers = nn.ModuleList(
            UrpeLayer(hidden_dim, ffn_dim, n_heads, dropout=dropout, attn_dropout=attn_dropout)
            for _ in range(L)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = MLPReadout(hidden_dim, outputs)

    def embed(self, graphs: Graphs) -> Tensor:
        """Give the nodes' states behind the last layer, `[N, hidden_dim]`."""
        h = project(self.node, graphs.x) + self.degree(degree(graphs.edge_index, graphs.nodes, DEGREES))
        if self.encoding is not None:
            h = h + project(self.encoding, encodings(self.of, graphs, h))
        padded = padding(graphs.starts, graphs.nodes)
        distance = self._distances(graphs, padded.valid.shape[1])  # [B, n, n]
        bias = self.bias[distance].permute(0, 3, 1, 2)  # [B, heads, n, n]
        factor = self.factor[distance].permute(0, 3, 1, 2)
        if self.edge_bias is not None:
            bias = bias + self._bonds(graphs, padded.slots, distance).permute(0, 3, 1, 2)
        x = padded.pad(h)
        for layer in self.layers:
            x = layer(x, padded.valid, bias, factor)
        return padded.pack(self.norm(x))

    def _distances(self, graphs: Graphs, most: int) -> Tensor:
        found = wanted(graphs.distances, "distances").long()
        if found.is_cpu and found.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in found.aminmax())
            if low < 0 or high > self.max_distance + 1:
                raise ValueError(
                    f"distances must be from 0 to {self.max_distance + 1}, and are from {low} to {high}"
                )
        return pad_pairs(found, graphs.starts, most, self.max_distance + 1)

    def _bonds(self, graphs: Graphs, slots: Tensor, distance: Tensor) -> Tensor:
        """What edges add to scores, destination's query with source's key, `[B, n, n, heads]`."""
        assert self.edge_bias is not None
        edge = project(self.edge_bias, wanted(graphs.edge_attr, "edge_attr"))  # [E, heads]
        most = distance.shape[1]
        source, target = slots[graphs.edge_index.long()]
        flat = edge.new_zeros(distance.numel(), self.n_heads)
        return flat.index_add(0, target * most + source % most, edge).unflatten(0, distance.shape)

    def forward(self, graphs: Graphs) -> Tensor:
        """Score: `[N, outputs]`, `[P, outputs]` or `[B, outputs]` by the readout.

        Raises:
            ValueError: The batch lacks what the model needs, or a shape or a distance is wrong.
        """
        return cast(Tensor, self.head(read_out(self.embed(graphs), graphs, self.readout)))


def urpe(
    outputs: int,
    node_types: list[int] | None = None,
    node_features: int = 0,
    edge_types: list[int] | None = None,
    edge_features: int = 0,
    encoding_dim: int = 0,
    hidden_dim: int = 80,
    ffn_dim: int = 80,
    L: int = 12,
    n_heads: int = 8,
    max_distance: int = 20,
    readout: Readout = "mean",
    dropout: float = 0.1,
    attn_dropout: float = 0.1,
) -> Urpe:
    """Build a graph transformer with URPE attention; the sizes are those of Graphormer-slim.

    Args:
        outputs: Numbers given out for each node, pair or graph.
        node_types: Categories of each of the nodes' columns; or
        node_features: features of a node.
        edge_types: Categories of each of the edges' columns; or
        edge_features: features of an edge.
        encoding_dim: Columns of the nodes' encodings; 0 for none.
        hidden_dim: Width, a multiple of n_heads.
        ffn_dim: Width within the feed-forward nets.
        L: Layers.
        n_heads: Heads.
        max_distance: The largest shortest path that is told from longer ones, in the batches too.
        readout: "node", "pair" (each of the batch's pairs of nodes), or "mean", "sum", "max" over a graph's.
        dropout: Probability, in training.
        attn_dropout: Probability that an attention weight is dropped, in training.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Source:
        arXiv 2205.13401; Graphormer, arXiv 2106.05234, for the rest.

    Example:
        >>> model = urpe(outputs=1, node_types=[28], edge_types=[4])
    """
    sizes = {"outputs": outputs, "hidden_dim": hidden_dim, "ffn_dim": ffn_dim, "L": L, "n_heads": n_heads}
    sizes["max_distance"] = max_distance
    chances = {"dropout": dropout, "attn_dropout": attn_dropout}
    check_sizes("urpe", sizes, readout=readout, hidden_dim=hidden_dim, **chances)
    of = inputs(node_types, node_features, edge_types, edge_features, encoding_dim)
    return Urpe(of, outputs, hidden_dim, ffn_dim, L, n_heads, max_distance, readout, dropout, attn_dropout)
