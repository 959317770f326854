"""Flow attention as its formulas, with all weights at once; the names are the paper's.

Features, sums and weights are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.precision import wide


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: float | None = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Attend by flows; arguments as the public function's."""
    query, key, value = wide(q).sigmoid(), wide(k).sigmoid(), wide(v)
    sinks, sources = q.shape[1], k.shape[1]
    seen = torch.ones(sinks, sources, dtype=value.dtype, device=q.device)
    seen = seen.tril() if causal else seen
    # How many tokens a step sees; what is not causal is not normalised by it.
    count = torch.arange(1, sources + 1, device=q.device).to(value.dtype) if causal else seen.new_ones(1)
    count = count[:, None]  # [L, 1], or [1, 1]

    def flow(to: Tensor, come: Tensor, visible: Tensor) -> Tensor:
        total = torch.einsum("ij,bjhd->bihd", visible, come)
        return ((to + eps) * (total + eps)).sum(-1)  # [B, N, H]

    incoming = flow(query, key, seen)
    outgoing = flow(key, query, seen if causal else seen.T)
    conserved_sink = flow(query, key * (count / outgoing)[..., None], seen) / count
    conserved_source = flow(key, query * (count / incoming)[..., None], seen if causal else seen.T) / count
    if clamp is not None:
        conserved_source = conserved_source.clamp(-clamp, clamp)
    if causal:
        competition = (conserved_source - conserved_source.logcumsumexp(1)).exp() * count
        allocation = conserved_sink.sigmoid()
    else:
        competition = conserved_source.softmax(1) * sources
        allocation = (conserved_sink * (sinks / sources)).sigmoid()
    weights = torch.einsum("bihd,bjhd,ij->bhij", query / incoming[..., None], key, seen)
    out = torch.einsum("bhij,bjhd->bihd", weights, value * competition[..., None])
    return (out * allocation[..., None]).to(v.dtype)
