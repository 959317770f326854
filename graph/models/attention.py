"""Attention of each node to all nodes of its graph.

Packed (no padding is stored, read or computed) where nothing but queries, keys and values is in play; padded
to the batch's largest graph where pairs of nodes have a bias or a factor, or attention weights are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import attention, varlen_attention
from manyheads.core.products import linear, project
from manyheads.graph.graphs import Padding, padding


class GraphAttention(nn.Module):
    """Project to queries, keys and values, attend within each graph, project back.

    The parameters are named and shaped as those of `nn.MultiheadAttention`.

    Args:
        dim: Width, a multiple of num_heads.
        num_heads: Heads.
        dropout: Probability that an attention weight is dropped in training.

    Shape:
        h `[N, dim]`; starts int32 `[B + 1]`; bias and post_scale `[B, heads, n, n]`, n being the largest
        graph's nodes; the result `[N, dim]`.

    Raises:
        UsageError: The heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise UsageError(f"graph attention: the width {dim} is not a multiple of {num_heads} heads")
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(
        self,
        h: Tensor,
        starts: Tensor,
        *,
        bias: Tensor | None = None,
        post_scale: Tensor | None = None,
        padded: Padding | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            h: The nodes' states.
            starts: Where each graph's nodes begin, and the end of the last.
            bias: Added to the scores of each pair of nodes.
            post_scale: Multiplies the weights of each pair after the softmax.
            padded: `padding(starts, N)`, for callers that have it; made here where it is needed.
        """
        packed = linear(h, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [N, heads, dim]
        dropout_p = self.dropout if self.training else 0.0
        if bias is None and post_scale is None and not dropout_p:
            return project(self.out_proj, varlen_attention(q, k, v, starts).flatten(1))
        padded = padding(starts, h.shape[0]) if padded is None else padded
        out = attention(
            *(padded.pad(x) for x in (q, k, v)),
            bias=bias,
            mask=padded.valid[:, None, None],
            post_scale=post_scale,
            dropout_p=dropout_p,
        )
        return project(self.out_proj, padded.pack(out).flatten(1))
