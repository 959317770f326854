"""Multi-head attention with its projections.

Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped queries, Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops.attention import attention
from manyheads.core.ops.attention.reference import Kind


class MultiHeadAttention(nn.Module):
    """Project to queries, keys and values, attend, project back.

    The three projections are one matrix, `qkv`: the rows of the queries, then the keys', then the values', as
    timm names and orders them.

    Args:
        dim: Width of the input, of the context and of the output.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, a divisor of `num_heads`; None means as many.
        head_dim: Width of a head; None means `dim / num_heads`.
        qkv_bias, proj_bias: Whether the projections in, and the one back, have a bias.
        dropout: Probability that an attention weight is dropped in training.
        kind: "softmax" or "sigmoid", as `manyheads.core.ops.attention`.

    Shape:
        x: `[B, Nq, dim]`; context: `[B, Nk, dim]`, x itself if None; bias, mask, post_scale broadcast to
        `[B, num_heads, Nq, Nk]`; the result `[B, Nq, dim]`.

    Raises:
        ValueError: The widths or head counts do not divide.

    Example:
        >>> layer = MultiHeadAttention(384, 6)
        >>> layer(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        dropout: float = 0.0,
        kind: Kind = "softmax",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}; or give head_dim")
        if num_heads % kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {kv_heads}")
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.dropout, self.kind = dropout, kind
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        post_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend from x to the context.

        Args:
            context: What keys and values come from; None means x.
            bias: Added to the scores.
            mask: True where a key takes part.
            causal: A query sees no later key.
            post_scale: Multiplies the weights after the softmax.
        """
        q, k, v = self._project(x, context)
        out = attention(
            q,
            k,
            v,
            bias=bias,
            mask=mask,
            causal=causal,
            kind=self.kind,
            post_scale=post_scale,
            dropout_p=self.dropout if self.training else 0.0,
        )  # [B, Nq, H, D]
        return self.proj(out.flatten(2))

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, Nq, H, D]`, keys and values `[B, Nk, Hk, D]`."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        if context is None:
            q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(sizes, dim=2)
            return q, k, v
        split = self.num_heads * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[:split], None if bias is None else bias[:split])
        kv = F.linear(context, weight[split:], None if bias is None else bias[split:])
        k, v = kv.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        return q.unflatten(-1, (-1, self.head_dim)), k, v
