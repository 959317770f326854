"""Linear attention that corrects what it stored (DeltaNet), gated or not: the public functions.

README.md beside this file has the chunked form and its backward.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.decay_attention import check_inputs, check_states
from manyheads.core.ops.delta_rule import reference
from manyheads.core.ops.delta_rule.custom_op import delta_rule_op

__all__ = ["delta_rule", "delta_rule_step"]


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
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
    """Scan `S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T`, and read `o_t = scale * S_t^T q_t`.

    S'_t is `exp(log_decay_t) S_{t-1}`, or `S_{t-1}` without a gate: the value that the key had is taken out
    by the share beta, and the new one put in. Keys must be about of unit length (`normalize`, or normalised
    by the caller): where `beta |k|^2` passes 2 the state grows with every step.

    Args:
        q, k, v: Queries, keys and values, one dtype.
        beta: The share written, in 0..1 (up to 2 for unit keys); one a head, or one a value channel, which
            no fast path takes.
        log_decay: The gate's logarithm, at most 0.
        scale: None for `K ** -0.5`.
        normalize: Divide queries and keys by their lengths first.
        initial_state: Before the first step; None for zeros.
        return_state: Return the state after the last step too, in float32.
        cu_seqlens: int32 bounds of packed sequences, from 0 to L. B is 1 then.

    Shape:
        q, k: `[B, L, H, K]`; v and the output: `[B, L, H, V]`; beta: `[B, L, H]` or `[B, L, H, V]`;
        log_decay: `[B, L, H]`; states: `[S, H, K, V]`, S the batch or the number of packed sequences;
        cu_seqlens: `[S + 1]`.

    Returns:
        The output in v's dtype; with `return_state` (output, state).

    Raises:
        TypeError: q, k, v are not of one floating dtype, or another tensor's dtype is wrong.
        ValueError: A shape, a device or cu_seqlens is wrong.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Yang et al. 2024, arXiv 2406.06484; gated: Yang et al. 2024, arXiv 2412.06464.

    Example:
        >>> q = k = v = torch.randn(2, 100, 4, 16)
        >>> out, state = delta_rule(q, k, v, torch.rand(2, 100, 4), normalize=True, return_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))
    """
    _check("delta_rule", q, k, v, beta, log_decay)
    check_states("delta_rule", q, k, v, initial_state, cu_seqlens)
    out, state = _scan(q, k, v, beta, log_decay, scale, normalize, initial_state, cu_seqlens)
    return (out, state) if return_state else out


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    normalize: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    size = "wide" if q.shape[3] > 64 else "usual"
    channels = beta.dim() == 4
    backend = choose("delta_rule", device=q.device.type, dtype=q.dtype, channels=channels, size=size).backend
    if backend == "reference" or not v.numel() or not q.numel():
        return reference.delta_rule(
            q, k, v, beta, log_decay=log_decay, scale=scale, normalize=normalize, initial_state=initial_state,
            return_state=True, cu_seqlens=cu_seqlens,
        )  # type: ignore[return-value]  # fmt: skip
    if normalize:
        q, k = reference.unit(q), reference.unit(k)
    given = [x for x in (q, k, v, beta, log_decay, initial_state) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state, _ = delta_rule_op(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, keep, backend)
    return out, state


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
    """Take one step of `delta_rule`, for streaming.

    Args:
        state: After the steps before; zeros at first. It is not changed.
        q, k, v, beta, log_decay, scale, normalize: As in `delta_rule`, of one step.

    Shape:
        state: `[B, H, K, V]`; q, k: `[B, H, K]`; v and the output: `[B, H, V]`; beta: `[B, H]` or
        `[B, H, V]`; log_decay: `[B, H]`.

    Returns:
        The output in v's dtype, and the new state, float32.

    Raises:
        TypeError, ValueError: As `delta_rule`.
    """
    op = "delta_rule_step"
    if v.dim() != 3 or q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"{op}: q, k and v must be [B, H, dim], not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    one = [x[:, None] for x in (q, k, v, beta)]
    _check(op, one[0], one[1], one[2], one[3], None if log_decay is None else log_decay[:, None])
    check_states(op, one[0], one[1], one[2], state, None)
    return reference.delta_rule_step(
        state, q, k, v, beta, log_decay=log_decay, scale=scale, normalize=normalize
    )


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    check_inputs(op, q, k, v)
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(f"{op}: q, k and v have {q.shape[2]}, {k.shape[2]} and {v.shape[2]} heads")
    for name, x, shapes in (("beta", beta, (v.shape[:3], v.shape)), ("log_decay", log_decay, (v.shape[:3],))):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating, not {x.dtype}")
        if x.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{op}: {name} must be {wanted}, not {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q is on {q.device}")
