"""ProbSparse attention against the published gather formula, and against dense attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import prob_sparse_attention

FACTOR = 5


def peer(q: Tensor, k: Tensor, v: Tensor, index_sample: Tensor) -> Tensor:
    """As published: a gathered copy of the sampled keys for every query, then the chosen rows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    batch, heads, length, dim = q.shape
    keys = k.shape[2]
    expanded = k.unsqueeze(-3).expand(batch, heads, length, keys, dim)
    sampled = expanded[:, :, torch.arange(length, device=q.device)[:, None], index_sample]
    products = torch.matmul(q.unsqueeze(-2), sampled.transpose(-2, -1)).squeeze(-2)
    measure = products.max(-1)[0] - products.sum(-1) / keys
    chosen = measure.topk(min(FACTOR * math.ceil(math.log(length)), length), sorted=False)[1]
    b = torch.arange(batch, device=q.device)[:, None, None]
    h = torch.arange(heads, device=q.device)[None, :, None]
    scores = torch.matmul(q[b, h, chosen], k.transpose(-2, -1)) / math.sqrt(dim)
    context = v.mean(-2).unsqueeze(-2).expand(batch, heads, length, dim).clone()
    context[b, h, chosen] = torch.matmul(scores.softmax(-1), v)
    return context.transpose(1, 2).contiguous()


def ours(q: Tensor, k: Tensor, v: Tensor, index_sample: Tensor) -> Tensor:
    """The op, with the same keys sampled."""
    return prob_sparse_attention(q, k, v, FACTOR, index_sample=index_sample)


def dense(q: Tensor, k: Tensor, v: Tensor, index_sample: Tensor) -> Tensor:
    """Attention of all queries."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def cases(device: str) -> Iterator[Case]:
    """Yield the issue's line, the forward pass alone, and both against dense attention."""
    given = [torch.randn(32, 96, 8, 64, device=device) for _ in range(3)]
    index = torch.randint(96, (96, FACTOR * math.ceil(math.log(96))), device=device)
    for theirs, peer_name, target in (
        (peer, "gathered keys", 3.0),
        (dense, "scaled_dot_product_attention, dense", 1.0),
    ):
        for name, make in (("forward+backward", training), ("forward", inference)):
            a, b = make(ours, *given, index), make(theirs, *given, index)
            yield Case(
                name=f"prob_sparse_attention {name}",
                shape="B32 H8 E64 L96 factor 5",
                peer=f"{peer_name}, torch {torch.__version__}",
                ours=a,
                theirs=b,
                target=target,
                difference=difference(a, b) if theirs is peer else None,
            )
