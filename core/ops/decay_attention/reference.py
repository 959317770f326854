"""Linear attention with decay as its recurrence, one step after the other: the truth for the other backends.

The state is float32 (float64 for float64 inputs), whatever the dtype of q, k and v.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from manyheads.core.ops.precision import wide


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan `S_t = a_t S_{t-1} + k_t v_t^T`, `o_t = scale * q_t S_t`; arguments as the public function's."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = v.shape[2]
    query, key = (wide(x).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    decay = wide(log_decay).expand(*v.shape[:2], heads) if log_decay.dim() == 1 else wide(log_decay)
    decay = (decay[..., None] if decay.dim() == 3 else decay).exp()  # [B, L, H, 1 or K]
    value, shape = wide(v), (heads, q.shape[3], v.shape[3])
    if cu_seqlens is None:
        state = _start(initial_state, (q.shape[0], *shape), query)
        out, state = _scan(query, key, value, decay, state, reverse)
    else:
        bounds = list(itertools.pairwise(cu_seqlens.tolist()))
        states = _start(initial_state, (len(bounds), *shape), query)
        found = [
            _scan(query[:, a:b], key[:, a:b], value[:, a:b], decay[:, a:b], states[i : i + 1], reverse)
            for i, (a, b) in enumerate(bounds)
        ]
        out = torch.cat([x for x, _ in found], 1)
        state = torch.cat([x for _, x in found])
    out = (out * scale).to(q.dtype)
    return (out, state) if return_state else out


def decay_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Take one step of the recurrence; arguments as the public function's."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = v.shape[1]
    query, key = (wide(x).repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    decay = wide(log_decay).expand(v.shape[:2]) if log_decay.dim() == 1 else wide(log_decay)
    decay = (decay[..., None] if decay.dim() == 2 else decay).exp()
    state = decay[..., None] * wide(state) + key[..., None] * wide(v)[..., None, :]  # [B, H, K, V]
    return ((query[..., None, :] @ state)[..., 0, :] * scale).to(q.dtype), state


def _scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """All steps of sequences of one length: outputs `[B, L, H, V]` and the last state `[B, H, K, V]`."""
    found = []
    length = q.shape[1]
    for t in range(length)[:: -1 if reverse else 1]:
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        found.append((q[:, t, :, None, :] @ state)[:, :, 0])  # [B, H, V]
    out = torch.stack(found[:: -1 if reverse else 1], 1) if found else v * 0
    return out, state


def _start(initial: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if initial is None else initial.to(like.dtype)
