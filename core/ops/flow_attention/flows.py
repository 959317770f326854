"""Flow attention in linear time: no token meets another but through sums over tokens.

`flow(x, total) = (x + eps) . (total + eps)`, as in the paper's code, is computed as
`x . (total + eps) + eps * sum(total + eps)`, which needs no copy of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.linear_attention import linear_attention


def everything(q: Tensor, k: Tensor, v: Tensor, clamp: float | None, eps: float) -> Tensor:
    """Every query sees every key.

    Args:
        q, k: Features, positive.

    Shape:
        As the public function's.
    """
    sinks, sources = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    incoming = _received(q, k.sum(2, keepdim=True), eps)  # [B, H, L, 1]
    outgoing = _received(k, q.sum(2, keepdim=True), eps)  # [B, H, S, 1]
    sink = _received(q, (1 / outgoing).mT @ k, eps)
    source = _received(k, (1 / incoming).mT @ q, eps)
    competition = _bounded(source, clamp).softmax(2) * sources
    allocation = (sink * (sinks / sources)).sigmoid()
    return (q @ (k.mT @ (v * competition)) * (allocation / incoming)).transpose(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, clamp: float | None, eps: float) -> Tensor:
    """A step sees the keys up to its own.

    Args:
        q, k: Features, positive.

    Shape:
        As the public function's, L = S.
    """
    count = torch.arange(1, k.shape[1] + 1, device=k.device).to(k.dtype)[:, None, None]  # [L, 1, 1]
    incoming = _so_far(q, k, eps)  # [B, L, H, 1]
    outgoing = _so_far(k, q, eps)
    sink = _so_far(q, k * (count / outgoing), eps) / count
    source = _bounded(_so_far(k, q * (count / incoming), eps) / count, clamp)
    # A running softmax; the logarithm keeps unbounded flows from overflowing.
    competition = (source - source.logcumsumexp(1)).exp() * count
    summed = linear_attention(q, k, v * competition, causal=True, normalize=False, scale=1.0)
    return summed * (sink.sigmoid() / incoming)


def _received(x: Tensor, total: Tensor, eps: float) -> Tensor:
    """Flow to each of x `[B, H, N, D]` from one total `[B, H, 1, D]`: `[B, H, N, 1]`."""
    total = total + eps
    return x @ total.mT + eps * total.sum(-1, keepdim=True)


def _so_far(x: Tensor, others: Tensor, eps: float) -> Tensor:
    """Flow to each of x `[B, L, H, D]` from the others up to its step: `[B, L, H, 1]`."""
    return ((x + eps) * (others.cumsum(1) + eps)).sum(-1, keepdim=True)


def _bounded(source: Tensor, clamp: float | None) -> Tensor:
    return source if clamp is None else source.clamp(-clamp, clamp)
