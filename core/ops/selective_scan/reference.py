"""The selective scan, one step after the other, for any floating dtype."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops import packed


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `manyheads.core.ops.selective_scan`, in float32 or, where an input is float64, in that."""
    given = [x for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    edges = [0, u.shape[1]] if cu_seqlens is None else packed.bounds("selective_scan", cu_seqlens, u.shape[1])
    dt = delta.to(wide)
    if delta_bias is not None:
        dt = dt + delta_bias.to(wide)
    if delta_softplus:
        dt = F.softplus(dt)
    kept = torch.exp(dt[..., None] * A.to(wide))  # [B, L, D, N]
    added = (dt * u.to(wide))[..., None] * B.to(wide)[:, :, None]  # [B, L, D, N]
    states = (
        kept.new_zeros(u.shape[0] * (len(edges) - 1), *A.shape) if initial_state is None else initial_state
    )
    if torch.compiler.is_exporting() and cu_seqlens is None:  # every step would stand in the program
        h = _doubled(kept, added, states.to(wide), reverse)
        y, last = (h @ C[..., None].to(wide))[..., 0], [h[:, 0 if reverse else -1]]
        return _ended(u, y, D, z, last, return_state)
    steps: dict[int, Tensor] = {}
    last = []
    for (start, end), h0 in zip(itertools.pairwise(edges), states.to(wide).split(u.shape[0]), strict=True):
        h = h0
        for t in reversed(range(start, end)) if reverse else range(start, end):
            h = kept[:, t] * h + added[:, t]
            steps[t] = (h @ C[:, t, :, None].to(wide))[..., 0]
        last.append(h)
    y = torch.stack([steps[t] for t in sorted(steps)], 1) if steps else u.to(wide)
    return _ended(u, y, D, z, last, return_state)


def _ended(
    u: Tensor, y: Tensor, D: Tensor | None, z: Tensor | None, last: list[Tensor], return_state: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Add what goes past the states, and the gate."""
    if D is not None:
        y = y + D.to(y) * u.to(y)
    if z is not None:
        y = y * F.silu(z.to(y))
    y = y.to(u.dtype)
    return (y, torch.cat(last)) if return_state else y


def _doubled(kept: Tensor, added: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Return all states `[B, L, D, N]` in log2(L) rounds: each joins every stretch with the one before it.

    Source:
        Hillis and Steele 1986.
    """
    if reverse:
        kept, added = kept.flip(1), added.flip(1)
    h = torch.cat([added[:, :1] + kept[:, :1] * state[:, None], added[:, 1:]], 1)
    span = 1
    while span < h.shape[1]:
        h = torch.cat([h[:, :span], h[:, span:] + kept[:, span:] * h[:, :-span]], 1)
        kept = torch.cat([kept[:, :span], kept[:, span:] * kept[:, :-span]], 1)
        span *= 2
    return h.flip(1) if reverse else h
