"""Linear attention as its formulas: the state step by step where it is causal, all weights where it is not.

Features, sums and states are float32 (float64 for float64 inputs), whatever the dtype of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureMap = Literal["identity", "elu", "relu", "squared_relu", "silu"]

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


class LinearState(NamedTuple):
    """What a causal linear attention carries from step to step.

    Attributes:
        kv: Sum of the products of keys and values, `[S, H, K, V]`.
        z: Sum of the keys, `[S, H, K]`; None where the outputs are not normalized.
    """

    kv: Tensor
    z: Tensor | None = None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    feature_map: FeatureMap = "identity",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-10,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attend with weights `phi(q_i) phi(k_j)`; arguments as the public function's."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = prepare(q, k, v, feature_map)
    query = query * scale
    if not causal:
        weights = torch.einsum("bihd,bjhd->bhij", query, key)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + eps)
        return torch.einsum("bhij,bjhd->bihd", weights, value).to(v.dtype)
    lengths = [v.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    rows = v.shape[0] if cu_seqlens is None else 1
    parts = [x.split(lengths, 1) for x in (query, key, value)]
    found, states = [], []
    for i, (qs, ks, vs) in enumerate(zip(*parts, strict=True)):
        out, state = _scan(qs, ks, vs, _rows(initial_state, i * rows, rows), normalize, eps)
        found.append(out)
        states.append(state)
    out = torch.cat(found, 1).to(v.dtype)
    kv = torch.cat([x.kv for x in states])
    z = torch.cat([x.z for x in states if x.z is not None]) if normalize else None
    return (out, LinearState(kv, z)) if return_state else out


def linear_attention_step(
    state: LinearState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "identity",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-10,
) -> tuple[Tensor, LinearState]:
    """Take one step of the causal form; arguments as the public function's."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = prepare(q[:, None], k[:, None], v[:, None], feature_map)
    out, state = _scan(query * scale, key, value, state, normalize, eps)
    return out[:, 0].to(v.dtype), state


def _rows(state: LinearState | None, first: int, count: int) -> LinearState | None:
    if state is None:
        return None
    of = slice(first, first + count)
    return LinearState(state.kv[of], None if state.z is None else state.z[of])


def _scan(
    q: Tensor, k: Tensor, v: Tensor, start: LinearState | None, normalize: bool, eps: float
) -> tuple[Tensor, LinearState]:
    """All steps of sequences of one length."""
    kv = k.new_zeros(*k[:, :0].sum(1).shape, v.shape[-1]) if start is None else start.kv.to(k.dtype)
    z = k[:, :0].sum(1) if start is None or start.z is None else start.z.to(k.dtype)  # [B, H, K]
    found = []
    for t in range(q.shape[1]):
        kv = kv + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + k[:, t]
        out = (q[:, t, :, None, :] @ kv)[..., 0, :]  # [B, H, V]
        found.append(out / ((q[:, t] * z).sum(-1, keepdim=True) + eps) if normalize else out)
    return torch.stack(found, 1) if found else v * 0, LinearState(kv, z if normalize else None)


def prepare(q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor, Tensor]:
    """Features of q and k for every head of v, and v, in float32 or float64."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    phi, heads = FEATURE_MAPS[feature_map], v.shape[2]
    query, key = (phi(x.to(dtype)) for x in (q, k))
    query, key = (
        x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2) for x in (query, key)
    )
    return query, key, v.to(dtype)
