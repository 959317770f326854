"""Segment attention against torch-geometric's message passing of the same formula: a batch of molecules.

128 random molecules as ZINC has them, about 23 atoms (a chain with branches and a ring closed here and there)
and 50 directed bonds each; hidden 64, 8 heads, edge channels in and out, clamp 5, eps 1e-6. Ours sorts the
edges in every call; "sorted once" has `edge_order` made beforehand, as the layers of a model share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch_geometric
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import edge_order, segment_attention

HEADS, DIM, CLAMP, EPS = 8, 8, 5.0, 1e-6


def molecules(count: int, seed: int = 0) -> tuple[Tensor, int]:
    """Edges `[2, E]` of random molecules, both directions of each bond, and the atoms' number."""
    generator = torch.Generator().manual_seed(seed)
    found, nodes = [], 0
    for _ in range(count):
        size = int(torch.randint(12, 36, (1,), generator=generator))
        atom = torch.arange(1, size)
        back = 1 + (torch.rand(size - 1, generator=generator) ** 3 * atom.clamp(max=4)).long()
        rings = torch.randint(0, size - 5, (4,), generator=generator)
        bonds = torch.stack([torch.cat([atom, rings + 5]), torch.cat([atom - back, rings])])
        both = torch.stack([bonds, bonds.flip(0)], -1).flatten(1)  # as RDKit's readers list them
        found.append(both + nodes)
        nodes += size
    return torch.cat(found, 1), nodes


class PlainMessages(MessagePassing):
    """The Graph Transformer's attention with edges as torch-geometric's users write it."""

    def __init__(self) -> None:
        super().__init__(aggr="add", node_dim=0)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, edge: Tensor, edge_index: Tensor
    ) -> tuple[Tensor, ...]:
        """The output and the edge output."""
        score = self.edge_updater(edge_index, q=q, k=k, edge=edge)
        weight = score.sum(-1, keepdim=True).clamp(-CLAMP, CLAMP).exp()
        mixed = self.propagate(edge_index, v=v, weight=weight)
        total = scatter(weight, edge_index[1], dim=0, dim_size=len(q), reduce="sum")
        return mixed / (total + EPS), score

    def edge_update(self, q_i: Tensor, k_j: Tensor, edge: Tensor) -> Tensor:
        """An edge's products."""
        return k_j * q_i / DIM**0.5 * edge

    def message(self, v_j: Tensor, weight: Tensor) -> Tensor:
        """What an edge sends."""
        return v_j * weight


def cases(device: str) -> Iterator[Case]:
    """Lines: forward, forward with backward, and the same with the edges sorted once."""
    edge_index, nodes = molecules(128)
    edges = edge_index.shape[1]
    shape = f"N{nodes} E{edges} H{HEADS} D{DIM}"
    edge_index = edge_index.to(device)
    inputs = [torch.randn(n, HEADS, DIM, device=device) for n in (nodes, nodes, nodes, edges)]
    order = edge_order(edge_index, nodes)
    peer = f"torch-geometric {torch_geometric.__version__} MessagePassing"
    messages = PlainMessages()

    def theirs(q: Tensor, k: Tensor, v: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
        return messages(q, k, v, edge, edge_index)

    def ours(q: Tensor, k: Tensor, v: Tensor, edge: Tensor, order=None) -> tuple[Tensor, ...]:
        return segment_attention(
            q, k, v, edge_index, edge=edge, clamp=CLAMP, eps=EPS, return_edge=True, order=order
        )

    both_ways = partial(training, cotangent=[torch.randn_like(x) for x in (inputs[0], inputs[3])])
    for name, op in (("", ours), (", sorted once", partial(ours, order=order))):
        for kind, make in (("forward", inference), ("forward+backward", both_ways)):
            steps = make(op, *inputs), make(theirs, *inputs)
            yield Case(
                f"segment_attention {kind}{name}",
                shape,
                peer,
                *steps,
                target=2.0,
                difference=difference(*steps),
            )
