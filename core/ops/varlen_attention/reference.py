"""Packed attention as its formula: one dense attention a sequence, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.attention.reference import attention
from manyheads.core.ops.packed import bounds


def bias_matrix(bias: Tensor, nq: int, nk: int) -> Tensor:
    """Spread a table `[H, 2M + 1]` over the scores `[H, Nq, Nk]` of a sequence; its last rows are aligned."""
    far = bias.shape[1] // 2
    query = torch.arange(nk - nq, nk, device=bias.device)[:, None]
    distance = torch.arange(nk, device=bias.device) - query  # [Nq, Nk]
    return bias[:, distance.clamp(-far, far) + far]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute packed attention sequence by sequence; arguments as the public function's."""
    starts_q = bounds("varlen_attention", cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    starts_k = starts_q
    if cu_seqlens_k is not None:
        starts_k = bounds("varlen_attention", cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    found = [q[:0]]
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        nq, nk = rows.stop - rows.start, keys.stop - keys.start
        if nk == 0:
            found.append(q[rows] * 0.0)  # nothing to attend to
            continue
        extra = None if bias is None else bias_matrix(bias, nq, nk)
        one = attention(q[None, rows], k[None, keys], v[None, keys], bias=extra, causal=causal, scale=scale)
        found.append(one[0])
    return torch.cat(found)  # [Tq, H, D]
