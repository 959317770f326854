"""Kernelised linear attention: causal by way of `decay_attention` without a decay, or two matrix products."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.decay_attention import check_inputs, check_states, features, run
from manyheads.core.ops.linear_attention import reference
from manyheads.core.ops.linear_attention.reference import FEATURE_MAPS, FeatureMap, LinearState, prepare

__all__ = ["LinearState", "linear_attention", "linear_attention_step"]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    feature_map: FeatureMap = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    feature_map: FeatureMap = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, LinearState]: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    feature_map: FeatureMap = ...,
    normalize: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    initial_state: LinearState | None = ...,
    return_state: bool = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, LinearState]: ...
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
    """Attend with weights `phi(q_i) phi(k_j)` in place of a softmax, in time linear in the length.

    Args:
        q, k, v: Queries, keys, values; fewer heads of q or k are shared by groups of v's.
        causal: A step sees the keys up to its own.
        feature_map: phi, of queries and keys alike: "identity", "elu" (elu(x) + 1), "relu", "squared_relu" or
            "silu".
        normalize: Divide by the sum of the weights; phi must then be positive.
        scale: Of the products; None means `1 / sqrt(K)`. Normalized outputs know it by eps only.
        eps: Added to the sum of the weights.
        initial_state: Of an earlier causal call; with `normalize` its z may not be None.
        return_state: Return the state after the last step, too, in float32 (causal only).
        cu_seqlens: int32 bounds of packed sequences, from 0 to L (causal only). B is 1 then.

    Shape:
        q `[B, L, Hq, K]`, k `[B, L, Hk, K]`, v and the result `[B, L, H, V]`; Hq and Hk divide H. Not causal:
        q's length may differ from that of k and v. States as `LinearState` says, S the batch or the number of
        packed sequences; cu_seqlens `[S + 1]`.

    Returns:
        The outputs in v's dtype; with `return_state` also the state.

    Raises:
        TypeError: q, k, v are not of one floating dtype, or another tensor's dtype is wrong.
        ValueError: A shape, a device, `feature_map` or cu_seqlens is wrong, or a call that is not causal has
            a state or cu_seqlens.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Katharopoulos et al. 2020 (arXiv 2006.16236).

    Example:
        >>> y = linear_attention(q, k, v, causal=True, feature_map="elu")
    """
    _check(q, k, v, causal, feature_map, normalize, initial_state, cu_seqlens, return_state)
    backend = _backend(q, k, v, causal)
    if backend == "reference":
        return reference.linear_attention(
            q, k, v, causal=causal, feature_map=feature_map, normalize=normalize, scale=scale, eps=eps,
            initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not causal:
        return _everything(*prepare(q, k, v, feature_map), normalize, scale, eps).to(v.dtype)
    found = _causal(q, k, v, feature_map, normalize, scale, eps, initial_state, cu_seqlens, backend)
    return found if return_state else found[0]


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
    """Take one step of the causal `linear_attention`, for streaming.

    Args:
        state: After the steps before; zeros at first. It is not changed.
        q, k, v, feature_map, normalize, scale, eps: As in `linear_attention`, of one step.

    Shape:
        state as `LinearState` says; q `[B, Hq, K]`, k `[B, Hk, K]`, v and the output `[B, H, V]`.

    Returns:
        The output in v's dtype, and the new state, float32.

    Raises:
        TypeError, ValueError: As `linear_attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"linear_attention_step: {name} must be [B, heads, dim], not {list(x.shape)}")
    _check(q[:, None], k[:, None], v[:, None], True, feature_map, normalize, state, None, True)
    return reference.linear_attention_step(
        state, q, k, v, feature_map=feature_map, normalize=normalize, scale=scale, eps=eps
    )


def _backend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    few = q.shape[1] * k.shape[1] * (q.shape[3] + v.shape[3])
    length = "short" if few <= (q.shape[1] + k.shape[1]) * q.shape[3] * v.shape[3] else "usual"
    about = features(q, v, None) | {"causal": causal, "length": length}
    return choose("linear_attention", device=q.device.type, dtype=q.dtype, **about).backend


def _everything(q: Tensor, k: Tensor, v: Tensor, normalize: bool, scale: float, eps: float) -> Tensor:
    """Every query sees every key: `q (k^T v)`."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    out = query @ (key.mT @ value * scale)
    if normalize:
        out = out / (query @ (key.sum(2) * scale)[..., None] + eps)
    return out.transpose(1, 2)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, LinearState]:
    phi = FEATURE_MAPS[feature_map]
    query, key = phi(q.float()), phi(k.float())
    kv, z = (None, None) if initial_state is None else initial_state
    if not normalize:
        # The kernels' products take half precision; on a CPU everything is float32 anyway.
        dtype = v.dtype if backend == "triton" else torch.float32
        out, last = run(
            query.to(dtype), key.to(dtype), v.to(dtype), None, scale, False, kv, cu_seqlens, backend
        )
        return out.to(v.dtype), LinearState(last)
    # Normalized outputs are quotients of sums that may leave float16's range: both in float32. The sum of the
    # weights is one more channel of the values, all ones.
    ones = v.new_ones(*v.shape[:3], 1, dtype=torch.float32)
    start = None if kv is None or z is None else torch.cat([kv.float(), z.float()[..., None]], -1)
    wide = torch.cat([v.float(), ones], -1)
    both, last = run(query, key, wide, None, scale, False, start, cu_seqlens, backend)
    out = both[..., :-1] / (both[..., -1:] + eps)
    return out.to(v.dtype), LinearState(last[..., :-1], last[..., -1])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    feature_map: str,
    normalize: bool,
    initial_state: LinearState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> None:
    op = "linear_attention"
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{op}: feature_map must be one of {', '.join(FEATURE_MAPS)}, not {feature_map!r}")
    if not causal:
        if initial_state is not None or return_state or cu_seqlens is not None:
            raise ValueError(f"{op}: states and cu_seqlens belong to causal=True")
        whole = q.dim() == k.dim() == v.dim() == 4
        if whole and (k.shape[:2] != v.shape[:2] or q.shape[0] != v.shape[0]):
            raise ValueError(f"{op}: q, k and v must agree in B, k and v in length")
        check_inputs(op, *(x[:, :0] if whole else x for x in (q, k, v)))  # q may have a length of its own
        return
    check_inputs(op, q, k, v)
    check_states(op, q, k, v, None if initial_state is None else initial_state.kv, cu_seqlens)
    if initial_state is None or not normalize:
        return
    if initial_state.z is None:
        raise ValueError(f"{op}: normalized, the initial state must have z, the sum of the keys")
    if initial_state.z.shape != initial_state.kv.shape[:3]:
        raise ValueError(
            f"{op}: the initial state's z must be {list(initial_state.kv.shape[:3])}, "
            f"not {list(initial_state.z.shape)}"
        )
