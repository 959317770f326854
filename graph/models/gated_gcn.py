"""GatedGCN: messages through gates that the edges carry along. arXiv 1711.07553, in the form of 2003.00982.

torch-geometric's `ResGatedGraphConv` is another: its gates are not normalised and its edges stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.products import project
from manyheads.graph.models.inputs import batch_norm

EPS = 1e-6  # added to the sum of the gates


class GatedGCNLayer(nn.Module):
    """One round of gated messages: nodes and edges, each with a batch norm and a residual.

    With i the destination and j the source: `e_ij = D x_i + E x_j + C e_ij`, gates `g = sigmoid(e_ij)`, and
    `x_i = A x_i + sum_j g B x_j / (sum_j g + 1e-6)`, channel by channel. Parameters are named as published.

    Args:
        dim: Width of nodes and edges.
        dropout: Probability, in training.

    Shape:
        x `[N, dim]`; e `[E, dim]`; the results likewise.
    """

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(dim, dim) for _ in range(5))
        self.bn_node_x = nn.BatchNorm1d(dim)
        self.bn_edge_e = nn.BatchNorm1d(dim)
        self.dropout = dropout

    def forward(self, x: Tensor, e: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Pass messages along the edges."""
        source, target = edge_index
        found = project(self.D, x)[target] + project(self.E, x)[source] + project(self.C, e)  # [E, dim]
        gate = found.sigmoid()
        total = torch.zeros_like(x).index_add(0, target, gate)
        mixed = torch.zeros_like(x).index_add(0, target, gate * project(self.B, x)[source])
        y = F.relu(batch_norm(self.bn_node_x, project(self.A, x) + mixed / (total + EPS)))
        found = F.relu(batch_norm(self.bn_edge_e, found))
        y, found = (F.dropout(z, self.dropout, self.training) for z in (y, found))
        return x + y, e + found
