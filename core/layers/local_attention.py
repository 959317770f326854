"""Longformer's self-attention: a band, and global tokens with projections of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops.attention import attention
from manyheads.core.ops.local_attention import local_attention
from manyheads.core.products import project


class LongformerAttention(nn.Module):
    """Attend within a band, and from and to a few global tokens; no projection of the result.

    The parameters have the official names, so official weights load as they are. Global tokens attend to all
    real tokens through `query_global`, `key_global` and `value_global`; every token attends to them through
    the ordinary three.

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Tokens to each side (half of the official attention_window).
        dropout: Chance, in training, that an attention weight is set to zero.

    Shape:
        x and the result `[B, N, dim]`; global_tokens a count of first tokens, or places `[B, G]` (-1: none);
        mask `[B, N]`, True where a token is real. Rows of masked tokens are zero.

    Raises:
        ValueError: num_heads does not divide dim.

    Source:
        Beltagy et al. 2020, Longformer (arXiv 2004.05150).

    Example:
        >>> layer = LongformerAttention(768, 12, window=32)
        >>> layer(torch.randn(2, 100, 768), global_tokens=1).shape
        torch.Size([2, 100, 768])
    """

    def __init__(self, dim: int, num_heads: int, window: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        self.num_heads, self.head_dim, self.window = num_heads, dim // num_heads, window
        self.dropout = dropout
        # Beyond, projecting every token to a key and a value costs less than the folded products do.
        self.most_folded = self.head_dim // 2
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.query_global = nn.Linear(dim, dim)
        self.key_global = nn.Linear(dim, dim)
        self.value_global = nn.Linear(dim, dim)

    def forward(self, x: Tensor, global_tokens: int | Tensor = 0, mask: Tensor | None = None) -> Tensor:
        """Return the attended values, heads side by side."""
        q, k, v = (self._split(project(layer, x)) for layer in (self.query, self.key, self.value))
        none = isinstance(global_tokens, int) and global_tokens == 0
        rows = None if none else self._global(x, global_tokens, mask)
        out = local_attention(
            q, k, v, self.window, global_tokens=global_tokens, global_rows=rows, mask=mask,
            dropout_p=self._dropout_p,
        )  # fmt: skip
        return out.flatten(2)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _global(self, x: Tensor, global_tokens: int | Tensor, mask: Tensor | None) -> Tensor:
        """The rows of the global tokens, `[B, G, H, D]`."""
        if isinstance(global_tokens, int):
            tokens = x[:, :global_tokens]
        else:
            batch = torch.arange(x.shape[0], device=x.device)[:, None]
            tokens = x[batch, global_tokens.long().clamp(min=0)]
        query = self._split(self.query_global(tokens))
        if tokens.shape[1] <= self.most_folded:
            return self._few(x, query, mask)
        key, value = (self._split(project(layer, x)) for layer in (self.key_global, self.value_global))
        seen = None if mask is None else mask[:, None, None]
        return attention(query, key, value, mask=seen, dropout_p=self._dropout_p)

    def _few(self, x: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        """The same without keys and values of every token: q (W x + b) = (q W) x + q b, and so for values."""
        batch, count, heads, dim = query.shape
        weight, bias = self.key_global.weight.view(heads, dim, -1), self.key_global.bias.view(heads, dim)
        query = query * dim**-0.5
        folded = torch.einsum("bghd,hdc->bghc", query, weight)  # [B, G, H, dim of x]
        scores = folded.flatten(1, 2) @ x.transpose(1, 2) + (query * bias).sum(-1).flatten(1)[..., None]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1)  # [B, G * H, N]
        bias = self.value_global.bias.view(heads, dim)
        if self._dropout_p:
            weights = F.dropout(weights, self._dropout_p)
            bias = bias * weights.sum(-1).view(batch, count, heads, 1)  # they sum to one no longer
        mixed = (weights @ x).view(batch, count, heads, -1)
        weight = self.value_global.weight.view(heads, dim, -1)
        return torch.einsum("bghc,hdc->bghd", mixed, weight) + bias
