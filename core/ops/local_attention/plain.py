"""Local attention in plain torch, on any device: dense where the window holds all, else blocks of queries.

With dropout of the weights, which no faster path has. Memory grows with the tokens, not with their square.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.attention.reference import attention, softmax
from manyheads.core.ops.local_attention.reference import marked


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    top: Tensor | None,
    window: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the output `[B, N, H, D]`; `top` are the rows of the global tokens, whose places are `index`."""
    if window >= q.shape[1] - 1:
        seen = None if mask is None else mask[:, None, None]
        out = attention(q, k, v, mask=seen, scale=scale, dropout_p=dropout_p)
    else:
        out = _banded(q, k, v, index, mask, window, scale, dropout_p)
    if mask is not None:
        out = out.masked_fill(~mask[..., None, None], 0.0)
    if index is None or top is None:
        return out
    place = torch.arange(q.shape[1], device=q.device)
    for g in range(index.shape[1]):
        here = place == index[:, g, None]  # [B, N]
        out = torch.where(here[..., None, None], top[:, g, None], out)
    return out


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Blocks of S queries against strips of T = S + 2 window keys, and the G global keys beside these."""
    tokens, size = q.shape[1], max(16, min(128, window))
    rest = -tokens % size
    hidden = marked(index, q) if mask is None else marked(index, q) | ~mask
    strip = size + 2 * window
    hidden = F.pad(hidden, (window, window + rest), value=True).unfold(1, strip, size)  # [B, C, T]
    queries = F.pad(q, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, size))  # [B, C, S, H, D]
    keys, values = (
        F.pad(x, (0, 0, 0, 0, window, window + rest)).unfold(1, strip, size) for x in (k, v)
    )  # [B, C, H, D, T]
    distance = torch.arange(strip, device=q.device) - window
    distance = distance - torch.arange(size, device=q.device)[:, None]
    unseen = (distance.abs() > window) | hidden[:, :, None, None]  # [B, C, 1, S, T]
    scores = torch.einsum("bcshd,bchdt->bchst", queries, keys).masked_fill(unseen, -math.inf)
    if index is None:
        weights = _weights(scores, scale, dropout_p).to(v.dtype)
        out = torch.einsum("bchst,bchdt->bcshd", weights, values)
        return out.flatten(1, 2)[:, :tokens]
    rows = torch.arange(len(q), device=q.device)[:, None]
    far_keys, far_values = (x[rows, index.clamp(min=0)] for x in (k, v))  # [B, G, H, D]
    far = torch.einsum("bcshd,bghd->bchsg", queries, far_keys)
    far = far.masked_fill((index < 0)[:, None, None, None], -math.inf)
    weights = _weights(torch.cat([far, scores], -1), scale, dropout_p).to(v.dtype)
    count = index.shape[1]
    out = torch.einsum("bchst,bchdt->bcshd", weights[..., count:], values)
    out = out + torch.einsum("bchsg,bghd->bcshd", weights[..., :count], far_values)
    return out.flatten(1, 2)[:, :tokens]


def _weights(scores: Tensor, scale: float, dropout_p: float) -> Tensor:
    weights = softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale)
    return F.dropout(weights, dropout_p) if dropout_p else weights
