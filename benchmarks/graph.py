"""The graph room against torch-geometric: encodings of 1,000 molecules, and a training step of 128.

The molecules are random, of ZINC's sizes (`benchmarks.segment_attention`). The Laplacian peer is the
transform as its users call it, a graph at a time, with its defaults; it needs scipy. The peers of the
training step are the Graph Transformer's own formula on torch-geometric's message passing, and
torch-geometric's GPSConv around GINE, both with ten layers of 64 channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch_geometric
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GINEConv, GPSConv
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE

from benchmarks.measure import Case
from benchmarks.segment_attention import PlainMessages, molecules
from manyheads.core.ops import EdgeOrder
from manyheads.graph.encodings import laplacian, laplacian_spectrum, random_walk
from manyheads.graph.graphs import Graphs, graph_ids
from manyheads.graph.models.gps import gps_zinc
from manyheads.graph.models.graph_transformer import GraphTransformerLayer, graph_transformer_zinc

PEER = f"torch-geometric {torch_geometric.__version__}"


def batch(count: int, device: str = "cpu") -> Graphs:
    """Random molecules with atoms, bonds and encodings."""
    parts = [molecules(1, seed) for seed in range(count)]
    starts = torch.tensor([0, *(nodes for _, nodes in parts)]).cumsum(0).int()
    edge_index = torch.cat(
        [edges + first for (edges, _), first in zip(parts, starts, strict=False)], 1
    ).long()
    nodes, edges = int(starts[-1]), edge_index.shape[1]
    found = Graphs(
        torch.randint(0, 28, (nodes,)),
        edge_index,
        starts,
        torch.randint(0, 4, (edges,)),
        torch.randn(nodes, 20),
    )
    return Graphs(*(None if x is None else x.to(device) for x in found))


class PlainLayer(nn.Module):
    """Our layer's parameters, as its formula is written with nn.Linear on torch-geometric's messages."""

    def __init__(self, ours: GraphTransformerLayer) -> None:
        super().__init__()
        self.ours, self.messages = ours, PlainMessages()

    def forward(
        self, h: Tensor, e: Tensor, edge_index: Tensor, order: EdgeOrder | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ours."""
        at = self.ours.attention
        q, k, v, edge = (f(x).unflatten(-1, (8, 8)) for f, x in
                         ((at.Q, h), (at.K, h), (at.V, h), (at.proj_e, e)))  # fmt: skip
        mixed, products = self.messages(q, k, v, edge, edge_index)
        return self._finish("_h", h, mixed.flatten(1)), self._finish("_e", e, products.flatten(1))

    def _finish(self, s: str, x: Tensor, y: Tensor) -> Tensor:
        part = self.ours.get_submodule
        x = part(f"batch_norm1{s}")(x + part(f"O{s}")(y))
        y = part(f"FFN{s}_layer2")(part(f"FFN{s}_layer1")(x).relu())
        return part(f"batch_norm2{s}")(x + y)


class PeerGPS(nn.Module):
    """Ten of torch-geometric's GPS layers, between an embedding and the sum of a graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge, self.head = nn.Embedding(28, 64), nn.Embedding(4, 64), nn.Linear(64, 1)
        self.layers = nn.ModuleList(
            GPSConv(64, GINEConv(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))), heads=4)
            for _ in range(10)
        )

    def forward(self, graphs: Graphs) -> Tensor:
        """Score."""
        h, e = self.node(graphs.x), self.edge(graphs.edge_attr)
        ids = graph_ids(graphs.starts, graphs.nodes)
        for layer in self.layers:
            h = layer(h, graphs.edge_index, ids, edge_attr=e)
        return self.head(h.new_zeros(len(graphs.starts) - 1, 64).index_add(0, ids, h))


def step(model: nn.Module, graphs: Graphs) -> Tensor:
    """A forward and backward pass; the loss."""
    model.zero_grad(set_to_none=True)
    loss = model.train()(graphs).pow(2).mean()
    loss.backward()
    return loss.detach()


def cases(device: str) -> Iterator[Case]:
    """Lines: two encodings, and a training step of the Graph Transformer and of GPS."""
    if device == "cpu":
        yield from _encodings()
    graphs = batch(128, device)
    shape = f"128 graphs N{graphs.nodes} E{graphs.edge_index.shape[1]} L10 H64"
    ours, theirs = graph_transformer_zinc().to(device), graph_transformer_zinc().to(device)
    theirs.load_state_dict(ours.state_dict())
    theirs.layers = nn.ModuleList(PlainLayer(layer) for layer in theirs.layers)
    own = graphs._replace(encoding=graphs.encoding[:, :8])
    yield Case(
        "graph_transformer_zinc training step", shape, f"{PEER} MessagePassing",
        lambda: step(ours, own), lambda: step(theirs, own), target=2.0,
        difference=lambda: (step(ours, own) / step(theirs, own) - 1).abs().item(),
    )  # fmt: skip
    peer = PeerGPS().to(device)
    yield Case(
        "graph_transformer_zinc training step", shape, f"{PEER} GPSConv", lambda: step(ours, own),
        lambda: step(peer, graphs), target=1.0,
    )  # fmt: skip
    mine = gps_zinc(attn_dropout=0.0).to(device)
    yield Case(
        "gps_zinc training step", shape, f"{PEER} GPSConv", lambda: step(mine, graphs),
        lambda: step(peer, graphs),
    )  # fmt: skip


def _encodings() -> Iterator[Case]:
    graphs = batch(1000)
    starts = graphs.starts.tolist()
    own = graph_ids(graphs.starts, graphs.nodes)[graphs.edge_index[0]]
    ends = torch.bincount(own, minlength=1000).cumsum(0).tolist()
    data = [
        Data(edge_index=graphs.edge_index[:, a:b] - first, num_nodes=last - first)
        for a, b, first, last in zip([0, *ends], ends, starts, starts[1:], strict=False)
    ]
    shape = f"1000 graphs N{graphs.nodes} E{graphs.edge_index.shape[1]}"
    for name, k, ours, transform, target in (
        ("laplacian", 8, laplacian, AddLaplacianEigenvectorPE(8), 20.0),
        ("random_walk", 20, random_walk, AddRandomWalkPE(20), None),
    ):
        yield Case(
            f"{name} k={k}", shape, f"{PEER} {type(transform).__name__}",
            lambda ours=ours, k=k: ours(graphs.edge_index, graphs.starts, k),
            lambda transform=transform: [transform(one) for one in data],
            target=target,
            difference=(lambda: _residual(graphs)) if name == "laplacian" else None, tolerance=1e-12,
        )  # fmt: skip


def _residual(graphs: Graphs) -> float:
    """The largest entry of `L v - value v` over all graphs."""
    values, vectors = laplacian_spectrum(graphs.edge_index, graphs.starts, 8)
    source, target = graphs.edge_index
    scale = torch.bincount(source, minlength=graphs.nodes).double().rsqrt()  # every atom has a bond
    near = torch.zeros_like(vectors).index_add(0, source, (scale[:, None] * vectors)[target])
    own = values[graph_ids(graphs.starts, graphs.nodes)]
    return float((vectors - scale[:, None] * near - own * vectors).abs().max())
