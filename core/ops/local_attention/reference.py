"""Local attention as its formula: dense attention under a mask, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.attention.reference import attention


def global_index(global_tokens: int | Tensor, like: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the global tokens' places `[B, G]`, -1 where a place is unused or its token is masked."""
    if isinstance(global_tokens, int):
        if global_tokens == 0:
            return None
        index = torch.arange(global_tokens, device=like.device).expand(like.shape[0], -1)
    else:
        index = global_tokens.long()
    if mask is not None:
        index = torch.where(mask.gather(1, index.clamp(min=0)), index, -1)
    return index


def marked(index: Tensor | None, like: Tensor) -> Tensor:
    """Tell which tokens are global, `[B, N]`."""
    found = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    if index is None:
        return found
    places = torch.arange(like.shape[1], device=like.device)
    return found | (index[:, :, None] == places).any(1)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    global_tokens: int | Tensor = 0,
    global_rows: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute local attention with its whole matrix in memory; arguments as the public function's."""
    tokens = q.shape[1]
    index = global_index(global_tokens, q, mask)
    everywhere = marked(index, q)
    place = torch.arange(tokens, device=q.device)
    near = (place - place[:, None]).abs() <= window  # [N, N]
    seen = near | everywhere[:, None]  # [B, N, N]
    if mask is not None:
        seen = seen & mask[:, None] & mask[:, :, None]
    out = attention(q, k, v, mask=seen[:, None], scale=scale, dropout_p=dropout_p)
    if index is None:
        return out
    if global_rows is None:
        global_rows = rows_of_all(q, k, v, index, mask, scale, dropout_p)
    for g in range(index.shape[1]):
        here = place == index[:, g, None]  # [B, N]
        out = torch.where(here[..., None, None], global_rows[:, g, None], out)
    return out


def rows_of_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the rows `[B, G, H, D]` of the global tokens, which see every real token."""
    queries = q[torch.arange(q.shape[0], device=q.device)[:, None], index.clamp(min=0)]
    seen = None if mask is None else mask[:, None, None]
    return attention(queries, k, v, mask=seen, scale=scale, dropout_p=dropout_p)
