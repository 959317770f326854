"""The delta rule, the plain formula: one step after the other, any floating dtype."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from manyheads.core.ops.precision import wide

_EPS = 1e-6


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan step by step; as the public function. Half precision is computed in float32."""
    batch, length, heads, _ = q.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    state = wide(v).new_zeros(sequences, heads, q.shape[-1], v.shape[-1])
    if initial_state is not None:
        state = state + initial_state
    outputs, states = [], []
    for s, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = state if cu_seqlens is None else state[s : s + 1]
        for t in range(first, last):
            decay = None if log_decay is None else log_decay[:, t]
            out, part = delta_rule_step(
                part, q[:, t], k[:, t], v[:, t], beta[:, t], log_decay=decay, scale=scale, normalize=normalize
            )
            outputs.append(out)
        states.append(part)
    out = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return (out, torch.cat(states) if states else state) if return_state else out


def delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Take one step; as the public function."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if normalize:
        q, k = unit(q), unit(k)
    query, key, value, state = wide(q), wide(k), wide(v), wide(state)
    beta = wide(beta) if beta.dim() == 3 else wide(beta)[..., None]  # [B, H, V or 1]
    if log_decay is not None:
        state = state * wide(log_decay).exp()[..., None, None]
    written = beta * (value - torch.einsum("bhk,bhkv->bhv", key, state))
    state = state + key[..., None] * written[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", query * scale, state).to(v.dtype), state


def unit(x: Tensor) -> Tensor:
    """x over its length along the last axis, in x's dtype."""
    long = wide(x)
    return (long * (long.square().sum(-1, keepdim=True) + _EPS).rsqrt()).to(x.dtype)
