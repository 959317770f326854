"""The gated attention unit as its formula, with groups filled up by zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_attention_unit(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    group_size: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute with copies in whole groups; arguments as the public function's."""
    if u is None:
        v, u = v.chunk(2, -1)
    dtype, (batch, frames, _) = v.dtype, v.shape
    given = [x if x.dtype == torch.float64 else x.float() for x in (quad_q, quad_k, lin_q, lin_k, v, u)]
    inside = None
    if lengths is not None:
        inside = torch.arange(frames, device=v.device) < lengths.to(v.device)[:, None]  # [B, S]
        given = [x.masked_fill(~inside[..., None], 0.0) for x in given]
    seen = torch.ones(batch, frames, dtype=torch.bool, device=v.device) if mask is None else mask
    fill = -frames % group_size
    qq, qk, lq, lk, v, u = (
        F.pad(x, (0, 0, 0, fill)).unflatten(1, (-1, group_size)) for x in given
    )  # [B, G, g, K or E]
    seen = F.pad(seen, (0, fill)).unflatten(1, (-1, group_size))  # [B, G, g]
    weights = (qq @ qk.transpose(2, 3) / group_size).relu().square()
    weights = weights.masked_fill(~seen[:, :, None], 0.0)  # [B, G, g, g]
    if causal:
        weights = weights.tril()
    lk = lk.masked_fill(~seen[..., None], 0.0)
    count = torch.full((batch,), frames, device=v.device) if lengths is None else lengths.to(v.device)

    def attend(x: Tensor) -> Tensor:
        products = lk.transpose(2, 3) @ x  # [B, G, K, E]
        if causal:
            total = F.pad(products[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1) / group_size
        else:
            total = products.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None, None]
        return weights @ x + lq @ total

    out = attend(u) * v * torch.sigmoid(attend(v) * u)
    out = out.flatten(1, 2)[:, :frames]
    return (out if inside is None else out.masked_fill(~inside[..., None], 0.0)).to(dtype)
