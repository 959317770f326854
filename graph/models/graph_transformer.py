"""The Graph Transformer: nodes attend to their neighbours. arXiv 2012.09699.

Parameters have the names and shapes of the published code (graphdeeplearning/graphtransformer): its state
dicts, those of ZINC (edge variant), PATTERN and CLUSTER (node variant), load as they are (`load_official`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.ops import EdgeOrder, edge_order, segment_attention
from manyheads.core.products import project
from manyheads.core.weights import check_fit
from manyheads.graph.graphs import Graphs
from manyheads.graph.models.graph_transformer_step import Edges, Layer, Stream, fits, layers_step
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
    wanted,
)

Norm = Literal["batch", "layer", "both", "none"]
Isolated = Literal["zero", "nan"]
NORMS = ("batch", "layer", "both", "none")
CLAMP = 5.0  # of the logits, in place of taking their maximum off
EPS = 1e-6  # added to the sum of the weights, in the edge variant alone


class Attention(nn.Module):
    """Attention over each node's incoming edges.

    Args:
        in_dim: Width of nodes and edges.
        head_dim: Width of a head.
        num_heads: Heads.
        edges: The edge variant: products of queries and keys are multiplied by a projection of the edge.
        use_bias: Whether the projections have a bias.
        isolated: What a node without incoming edges gets in the node variant: "zero", or "nan" as published.
            (Zeros in the edge variant, in both.)

    Shape:
        h `[N, in_dim]`; e `[E, in_dim]`; the results `[N, heads, head_dim]`, `[E, heads, head_dim]` or None.
    """

    def __init__(
        self,
        in_dim: int,
        head_dim: int,
        num_heads: int,
        *,
        edges: bool,
        use_bias: bool = False,
        isolated: Isolated = "zero",
    ) -> None:
        super().__init__()
        self.Q = nn.Linear(in_dim, head_dim * num_heads, bias=use_bias)
        self.K = nn.Linear(in_dim, head_dim * num_heads, bias=use_bias)
        self.V = nn.Linear(in_dim, head_dim * num_heads, bias=use_bias)
        self.proj_e = nn.Linear(in_dim, head_dim * num_heads, bias=use_bias) if edges else None
        self.num_heads, self.isolated = num_heads, isolated

    def projections(self) -> list[nn.Module]:
        """Of queries, keys, values and, in the edge variant, edges."""
        return [self.Q, self.K, self.V] if self.proj_e is None else [self.Q, self.K, self.V, self.proj_e]

    def edges(self, edge_index: Tensor, order: EdgeOrder) -> Edges:
        """A graph's edges, and how they are attended along."""
        scale = (self.Q.out_features // self.num_heads) ** -0.5
        return Edges(edge_index, order, self.num_heads, scale, CLAMP, EPS if self.proj_e is not None else 0.0)

    def forward(
        self, h: Tensor, e: Tensor | None, edge_index: Tensor, order: EdgeOrder | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; give the nodes' new states, and the edges' in the edge variant."""
        q, k, v = (project(f, h).unflatten(-1, (self.num_heads, -1)) for f in (self.Q, self.K, self.V))
        if self.proj_e is not None:
            edge = project(self.proj_e, cast(Tensor, e)).unflatten(-1, (self.num_heads, -1))
            return segment_attention(
                q, k, v, edge_index, edge=edge, clamp=CLAMP, eps=EPS, return_edge=True, order=order
            )
        out = segment_attention(q, k, v, edge_index, clamp=CLAMP, order=order)
        if self.isolated == "nan":
            lonely = torch.ones(h.shape[0], dtype=torch.bool, device=h.device)
            lonely = lonely.index_fill(0, edge_index[1].long(), False)
            out = out.masked_fill(lonely[:, None, None], float("nan"))
        return out, None


class GraphTransformerLayer(nn.Module):
    """Attention and a feed-forward net, each with a residual and norms behind; edges likewise.

    Args:
        in_dim: Width of what comes in.
        out_dim: Width of what comes out, a multiple of num_heads; in_dim where there is a residual.
        num_heads: Heads.
        edges: The edge variant.
        dropout: Probability, in training.
        norm: "batch", "layer", "both" (layer norm first) or "none".
        residual: Whether what came in is added.
        use_bias: Whether the attention's projections have a bias.
        isolated: As `Attention`.

    Shape:
        h `[N, in_dim]` to `[N, out_dim]`; e `[E, in_dim]` to `[E, out_dim]`, or None.

    Raises:
        UsageError: The widths do not fit.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_heads: int,
        *,
        edges: bool,
        dropout: float = 0.0,
        norm: Norm = "batch",
        residual: bool = True,
        use_bias: bool = False,
        isolated: Isolated = "zero",
    ) -> None:
        super().__init__()
        if out_dim % num_heads:
            raise UsageError(f"graph transformer: the width {out_dim} is not a multiple of {num_heads} heads")
        if residual and in_dim != out_dim:
            raise UsageError(f"graph transformer: a residual from width {in_dim} to {out_dim} cannot be")
        if norm not in NORMS:
            raise UsageError(f"graph transformer: no norm {norm!r} (there are {', '.join(NORMS)})")
        self.attention = Attention(
            in_dim, out_dim // num_heads, num_heads, edges=edges, use_bias=use_bias, isolated=isolated
        )
        self.dropout, self.residual, self.norm = dropout, residual, norm
        self.streams: tuple[str, ...] = ("_h", "_e") if edges else ("",)
        for s in self.streams:  # the published names
            self.add_module(f"O{s}", nn.Linear(out_dim, out_dim))
            self.add_module(f"FFN{s}_layer1", nn.Linear(out_dim, out_dim * 2))
            self.add_module(f"FFN{s}_layer2", nn.Linear(out_dim * 2, out_dim))
            for i in (1, 2):
                if norm in ("layer", "both"):
                    self.add_module(f"layer_norm{i}{s}", nn.LayerNorm(out_dim))
                if norm in ("batch", "both"):
                    self.add_module(f"batch_norm{i}{s}", nn.BatchNorm1d(out_dim))

    def forward(
        self, h: Tensor, e: Tensor | None, edge_index: Tensor, order: EdgeOrder | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Give the nodes' new states, and the edges' in the edge variant."""
        mixed, products = self.attention(h, e, edge_index, order)
        h = self._finish(self.streams[0], h, mixed.flatten(1))
        if products is None or e is None:
            return h, None
        return h, self._finish(self.streams[1], e, products.flatten(1))

    def plain(self) -> Layer | None:
        """The layer's parts, if it is one of the form that `layers_step` has."""
        if self.norm != "batch" or not self.residual or (self.dropout and self.training):
            return None
        if self.attention.isolated != "zero" or self._forward_hooks or self._forward_pre_hooks:
            return None
        parts = ("O{}", "batch_norm1{}", "FFN{}_layer1", "FFN{}_layer2", "batch_norm2{}")
        streams = [Stream(*(self.get_submodule(part.format(s)) for part in parts)) for s in self.streams]
        return Layer(self.attention.projections(), streams)

    def _finish(self, s: str, x: Tensor, y: Tensor) -> Tensor:
        """What follows the attention, the same for nodes and edges with parameters of their own."""
        y = F.dropout(y, self.dropout, self.training)
        x = self._normed(f"1{s}", project(self.get_submodule(f"O{s}"), y, add=self._added(x)))
        y = project(self.get_submodule(f"FFN{s}_layer1"), x, relu=True)
        y = F.dropout(y, self.dropout, self.training)
        return self._normed(f"2{s}", project(self.get_submodule(f"FFN{s}_layer2"), y, add=self._added(x)))

    def _added(self, x: Tensor) -> Tensor | None:
        return x if self.residual else None

    def _normed(self, which: str, x: Tensor) -> Tensor:
        if self.norm in ("layer", "both"):
            x = self.get_submodule(f"layer_norm{which}")(x)
        return (
            batch_norm(self.get_submodule(f"batch_norm{which}"), x) if self.norm in ("batch", "both") else x
        )


class GraphTransformer(nn.Module):
    """Nodes attend to their neighbours, layer by layer; then nodes, pairs or whole graphs are scored.

    Args:
        of: What nodes and edges are made of.
        outputs: Numbers given out for each node, pair or graph.
        hidden_dim: Width, a multiple of n_heads.
        L: Layers.
        n_heads: Heads.
        edges: The edge variant, which carries states of the edges along.
        readout: "node", "pair", "mean", "sum" or "max".
        norm: "batch", "layer", "both" or "none".
        in_feat_dropout: Probability of the embedded nodes, in training; before the encodings are added in the
            edge variant, after it in the node variant, as published.
        dropout: Probability within the layers, in training.
        roles: Weisfeiler-Lehman roles that are embedded (the largest plus one); 0 for none.
        isolated: What a node without incoming edges gets: "zero", or "nan" as the published node variant.
    """

    def __init__(
        self,
        of: Inputs,
        outputs: int,
        hidden_dim: int,
        L: int,
        n_heads: int,
        edges: bool,
        readout: Readout,
        norm: Norm,
        in_feat_dropout: float = 0.0,
        dropout: float = 0.0,
        roles: int = 0,
        isolated: Isolated = "zero",
    ) -> None:
        super().__init__()
        self.of, self.edges, self.readout = of, edges, readout
        self.embedding_h = node_layer(of, hidden_dim)
        self.embedding_e = edge_layer(of, hidden_dim) if edges else None
        self.embedding_lap_pos_enc = nn.Linear(of.encoding_dim, hidden_dim) if of.encoding_dim else None
        self.embedding_wl_pos_enc = nn.Embedding(roles, hidden_dim) if roles else None
        self.in_feat_dropout = nn.Dropout(in_feat_dropout)
        self.layers = nn.ModuleList(
            GraphTransformerLayer(
                hidden_dim, hidden_dim, n_heads, edges=edges, dropout=dropout, norm=norm, isolated=isolated
            )
            for _ in range(L)
        )
        self.MLP_layer = MLPReadout(hidden_dim, outputs)

    def embed(self, graphs: Graphs) -> Tensor:
        """Give the nodes' states behind the last layer, `[N, hidden_dim]`."""
        h = project(self.embedding_h, graphs.x)
        h = self.in_feat_dropout(h) if self.edges else h
        if self.embedding_lap_pos_enc is not None:
            h = h + project(self.embedding_lap_pos_enc, encodings(self.of, graphs, h))
        if self.embedding_wl_pos_enc is not None:
            h = h + self.embedding_wl_pos_enc(wanted(graphs.roles, "roles"))
        h = h if self.edges else self.in_feat_dropout(h)
        e = None if self.embedding_e is None else embed_edges(self.embedding_e, self.of, graphs, h)
        order = edge_order(graphs.edge_index, graphs.nodes)
        known = [layer for layer in self.layers if type(layer) is GraphTransformerLayer]
        plain = [part for layer in known if (part := layer.plain()) is not None]
        if len(plain) == len(self.layers) and fits(plain, *([h] if e is None else [h, e])):
            return layers_step(plain, known[0].attention.edges(graphs.edge_index, order), h, e)[0]
        for layer in self.layers:
            h, e = layer(h, e, graphs.edge_index, order)
        return h

    def forward(self, graphs: Graphs) -> Tensor:
        """Score: `[N, outputs]`, `[P, outputs]` or `[B, outputs]` by the readout.

        Laplacian encodings are taken as they are: in training, flip their signs before
        (`manyheads.graph.encodings.flip_signs`).

        Raises:
            ValueError: The batch lacks what the model needs, or a shape is wrong.
        """
        return cast(Tensor, self.MLP_layer(read_out(self.embed(graphs), graphs, self.readout)))


def load_official(model: GraphTransformer, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of the published code, strictly; `module.` before every key is taken off.

    Args:
        model: Of the same sizes and options.
        state: Its `epoch_<n>.pkl` holds one: read it with `torch.load(..., weights_only=True)`.

    Raises:
        DataError: It is the other variant's, or keys or shapes differ; the first few are named.
    """
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    theirs = any(key.endswith("attention.proj_e.weight") for key in state)
    if theirs != model.edges:
        have, need = ("edge", "node") if theirs else ("node", "edge")
        raise DataError(
            f"Graph Transformer: the weights are of the {have} variant, the model of the {need} one"
        )
    check_fit(model, state, "Graph Transformer")
    model.load_state_dict(state, strict=True)


def graph_transformer(
    outputs: int,
    node_types: list[int] | None = None,
    node_features: int = 0,
    edge_types: list[int] | None = None,
    edge_features: int = 0,
    encoding_dim: int = 0,
    roles: int = 0,
    edges: bool = True,
    hidden_dim: int = 64,
    L: int = 10,
    n_heads: int = 8,
    readout: Readout = "mean",
    norm: Norm = "batch",
    in_feat_dropout: float = 0.0,
    dropout: float = 0.0,
    isolated: Isolated = "zero",
) -> GraphTransformer:
    """Build a Graph Transformer of any size.

    Args:
        outputs: Numbers given out for each node, pair or graph.
        node_types: Categories of each of the nodes' columns; or
        node_features: features of a node.
        edge_types: Categories of each of the edges' columns; or
        edge_features: features of an edge. With neither, all edges are alike.
        encoding_dim: Columns of the nodes' encodings; 0 for none.
        roles: Weisfeiler-Lehman roles that are embedded; 0 for none.
        edges: The edge variant. The node variant looks at no edge categories or features.
        hidden_dim: Width, a multiple of n_heads.
        L: Layers.
        n_heads: Heads.
        readout: "node", "pair" (each of the batch's pairs of nodes), or "mean", "sum", "max" over a graph's.
        norm: "batch", "layer", "both" or "none".
        in_feat_dropout: Probability of the embedded nodes, in training.
        dropout: Probability within the layers, in training.
        isolated: What a node without incoming edges gets: "zero", or "nan" as the published node variant.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Source:
        arXiv 2012.09699.

    Example:
        >>> model = graph_transformer(outputs=1, node_types=[28], edge_types=[4], encoding_dim=8)
    """
    sizes = {"outputs": outputs, "hidden_dim": hidden_dim, "L": L, "n_heads": n_heads}
    chances = {"in_feat_dropout": in_feat_dropout, "dropout": dropout}
    check_sizes("graph_transformer", sizes, readout=readout, hidden_dim=hidden_dim, **chances)
    if roles < 0:
        raise UsageError(f"graph_transformer: roles must not be negative, not {roles}")
    if isolated not in ("zero", "nan"):
        raise UsageError(f"graph_transformer: isolated is 'zero' or 'nan', not {isolated!r}")
    of = inputs(node_types, node_features, edge_types, edge_features, encoding_dim)
    if of.edges and not edges:
        raise UsageError("graph_transformer: the node variant takes no edge categories or features")
    return GraphTransformer(
        of, outputs, hidden_dim, L, n_heads, edges, readout, norm, in_feat_dropout, dropout, roles, isolated
    )


def graph_transformer_zinc(
    encoding_dim: int = 8, norm: Norm = "batch", dropout: float = 0.0
) -> GraphTransformer:
    """Build the model of ZINC: 588,929 parameters, 588,353 without encodings; the edge variant.

    28 atom types, 4 bond types, one number a molecule.

    Args:
        encoding_dim: Laplacian eigenvectors; 0 for none.
        norm: "batch", "layer", "both" or "none".
        dropout: Probability within the layers, in training.
    """
    return graph_transformer(
        1, node_types=[28], edge_types=[4], encoding_dim=encoding_dim, norm=norm, dropout=dropout
    )  # fmt: skip


def graph_transformer_pattern(
    encoding_dim: int = 2, norm: Norm = "batch", dropout: float = 0.0
) -> GraphTransformer:
    """Build the model of PATTERN: 522,982 parameters; the node variant, two classes a node; as `_zinc`."""
    return _sbm(2, 3, encoding_dim, norm, dropout)


def graph_transformer_cluster(
    encoding_dim: int = 10, norm: Norm = "batch", dropout: float = 0.0
) -> GraphTransformer:
    """Build the model of CLUSTER: 524,026 parameters; the node variant, six classes a node; as `_zinc`."""
    return _sbm(6, 7, encoding_dim, norm, dropout)


def _sbm(outputs: int, types: int, encoding_dim: int, norm: Norm, dropout: float) -> GraphTransformer:
    return graph_transformer(
        outputs, node_types=[types], encoding_dim=encoding_dim, edges=False, hidden_dim=80, readout="node",
        norm=norm, dropout=dropout,
    )  # fmt: skip
