"""ProbSparse attention as published: the sampled keys gathered for each query, then the chosen rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.core.ops.attention.reference import attention


def share(factor: float, length: int) -> int:
    """How many of `length` keys are sampled, or queries chosen."""
    return min(int(factor * math.ceil(math.log(length))), length)


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    causal: bool = False,
    scale: float | None = None,
    index_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample: bool = True,
    count: int | None = None,
    union: bool = False,
) -> Tensor:
    """Compute with gathered copies of the keys; arguments as the public function's."""
    length, keys = q.shape[1], k.shape[1]
    if index_sample is None:
        every = torch.arange(keys, device=q.device).expand(length, keys)
        drawn = torch.randint(keys, (length, max(1, share(factor, keys))), generator=generator)
        index_sample = drawn.to(q.device) if sample else every
    sampled = _wide(k)[:, index_sample]  # [B, Lq, U, H, D]
    products = torch.einsum("blhd,bluhd->bhlu", _wide(q), sampled)
    measure = products.amax(-1) - products.sum(-1) / keys  # [B, H, Lq]
    chosen = measure.topk(share(factor, length) if count is None else count).indices  # [B, H, u]
    if union:
        chosen = chosen.flatten().expand(q.shape[0], 1, -1)
    index = chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[3])  # [B, u, H, D]
    seen = torch.arange(keys, device=q.device) <= chosen[..., None] if causal else None  # [B, H, u, Lk]
    rows = attention(q.gather(1, index), k, v, mask=seen, scale=scale)
    others = _wide(v).cumsum(1) if causal else _wide(v).mean(1, keepdim=True).expand_as(q)
    return others.to(v.dtype).scatter(1, index, rows)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
