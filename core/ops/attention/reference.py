"""Attention as its formula: the plain truth that every backend is held to, in any dtype."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["softmax", "sigmoid"]


def causal_mask(nq: int, nk: int, device: torch.device | None = None) -> Tensor:
    """Return the mask `[Nq, Nk]` in which the last query sees all keys, each one before it one less."""
    return torch.ones(nq, nk, dtype=torch.bool, device=device).tril(nk - nq)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: Kind = "softmax",
    post_scale: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention with its whole matrix in memory; arguments as the public function's."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        triangle = causal_mask(q.shape[1], k.shape[1], q.device)
        mask = triangle if mask is None else mask & triangle
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores) if kind == "softmax" else torch.sigmoid(scores - math.log(max(k.shape[1], 1)))
    if post_scale is not None:
        weights = weights * post_scale
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)  # [B, Nq, H, D]


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys, zero in a row that has none, with zero gradients there and no NaN."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
