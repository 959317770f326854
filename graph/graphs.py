"""A batch of graphs that lie one after another: no padding is stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Graphs(NamedTuple):
    """What every graph model takes: the nodes of all graphs in a row, and the edges between them.

    Attributes:
        x: The nodes: categories (whole numbers, a column a kind) or features (floating point).
        edge_index: Sources in row 0, destinations in row 1; an undirected edge is there in both directions.
        starts: Where each graph's nodes begin, and the end of the last: 0, n1, n1 + n2, ..., N.
        edge_attr: The edges: categories or features; None where a model needs none.
        encoding: Positional or structural encodings of the nodes (`manyheads.graph.encodings`).
        roles: Weisfeiler-Lehman roles of the nodes, for models that embed them.
        distances: Shortest paths within each graph, its n x n numbers row by row, the graphs in a row.
        pairs: The two nodes of each pair to be scored, for models that score pairs.

    Shape:
        x `[N]`, `[N, columns]` or `[N, features]`; edge_index `[2, E]`; starts int32 `[B + 1]`; edge_attr as
        x with E rows; encoding `[N, k]`; roles `[N]`; distances `[n1 ** 2 + n2 ** 2 + ...]`; pairs `[2, P]`.

    Example:
        >>> ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
        >>> starts = torch.tensor([0, 3], dtype=torch.int32)
        >>> Graphs(torch.tensor([6, 6, 8]), ring, starts, torch.ones(6, dtype=torch.int64)).nodes
        3
    """

    x: Tensor
    edge_index: Tensor
    starts: Tensor
    edge_attr: Tensor | None = None
    encoding: Tensor | None = None
    roles: Tensor | None = None
    distances: Tensor | None = None
    pairs: Tensor | None = None

    @property
    def nodes(self) -> int:
        """Nodes of all graphs together."""
        return self.x.shape[0]

    @property
    def sizes(self) -> Tensor:
        """Nodes of each graph, `[B]`."""
        return self.starts.diff()


def graph_ids(starts: Tensor, nodes: int) -> Tensor:
    """Each node's graph, `[N]` int64."""
    sizes = starts.diff().long()
    every = torch.arange(sizes.shape[0], device=starts.device)
    return torch.repeat_interleave(every, sizes, output_size=nodes)


class Padding(NamedTuple):
    """How packed nodes lie in a padded batch.

    Attributes:
        valid: True where a slot holds a node, `[B, n]`, n being the largest graph's nodes.
        slots: Each node's slot in the flattened `[B * n]`, `[N]`.
    """

    valid: Tensor
    slots: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """From `[N, ...]` to `[B, n, ...]`, zeros between."""
        flat = x.new_zeros(self.valid.numel(), *x.shape[1:])
        return flat.index_copy(0, self.slots, x).unflatten(0, self.valid.shape)

    def pack(self, x: Tensor) -> Tensor:
        """From `[B, n, ...]` to `[N, ...]`."""
        return x.flatten(0, 1)[self.slots]


def padding(starts: Tensor, nodes: int) -> Padding:
    """Return how the nodes lie in a padded batch; waits for the device to learn the largest size."""
    sizes = starts.diff().long()
    most = int(sizes.max()) if sizes.numel() else 0
    valid = torch.arange(most, device=starts.device) < sizes[:, None]  # [B, n]
    graph = graph_ids(starts, nodes)
    place = torch.arange(nodes, device=starts.device) - starts.long()[graph]
    return Padding(valid, graph * most + place)


def pad_pairs(flat: Tensor, starts: Tensor, most: int, fill: int) -> Tensor:
    """From the n x n numbers of each graph in a row to `[B, most, most]`.

    Raises:
        ValueError: There are not as many numbers as the graphs' sizes ask for.
    """
    sizes = starts.diff().long()
    place = torch.arange(most, device=starts.device)
    valid = place < sizes[:, None]  # [B, n]
    squares = sizes.square()
    if not torch.compiler.is_compiling() and flat.shape[0] != (wanted := int(squares.sum())):
        raise ValueError(f"graphs of these sizes have {wanted} pairs of nodes, not {flat.shape[0]}")
    first = (squares.cumsum(0) - squares)[:, None, None]  # [B, 1, 1]
    index = first + place[:, None] * sizes[:, None, None] + place  # [B, n, n]
    both = valid[:, :, None] & valid[:, None, :]
    if not flat.numel():
        return flat.new_full(both.shape, fill)
    return flat[index.where(both, 0)].where(both, fill)


def full_graph(graphs: Graphs) -> Graphs:
    """The same nodes with an edge between any two of a graph, in both directions, and none to themselves.

    The edges' categories or features are zeros, as published. What was made of the old edges (encodings,
    roles, distances) stays.

    Shape:
        edge_index `[2, n1 * (n1 - 1) + n2 * (n2 - 1) + ...]`, graph after graph.

    Source:
        Dwivedi and Bresson 2020, arXiv 2012.09699, "full graph".
    """
    sizes = graphs.sizes.long()
    others = (sizes - 1).clamp(min=0).repeat_interleave(sizes)  # edges out of each node, [N]
    source = torch.arange(graphs.nodes, device=sizes.device).repeat_interleave(others)
    place = torch.arange(source.shape[0], device=sizes.device) - (others.cumsum(0) - others)[source]
    target = graphs.starts.long()[graph_ids(graphs.starts, graphs.nodes)[source]] + place
    target = target + (target >= source).long()  # not the node itself
    edges, old = torch.stack([source, target]), graphs.edge_attr
    attributes = None if old is None else old.new_zeros(edges.shape[1], *old.shape[1:])
    return graphs._replace(edge_index=edges.to(graphs.edge_index.dtype), edge_attr=attributes)
