"""Linear attention whose state fades: retention, gated linear attention (GLA) and SSD (Mamba-2) are one op.

README.md beside this file has the chunked form and its backward.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops import packed
from manyheads.core.ops.decay_attention import reference
from manyheads.core.ops.decay_attention.custom_op import decay_attention_op
from manyheads.core.ops.decay_attention.reference import decay_attention_step as _step

__all__ = ["decay_attention", "decay_attention_step"]

MAX_WIDTH = 256  # of keys and values in a kernel


@overload
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = ...,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: bool = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    """Scan `S_t = a_t S_{t-1} + k_t v_t^T` with `a_t = exp(log_decay_t)`, and read `o_t = scale * q_t S_t`.

    Args:
        q: Queries (C of SSD); fewer heads than the values' are shared by groups of them.
        k: Keys (B of SSD, or B times the step size); may be shared likewise.
        v: Values (x of SSD).
        log_decay: Of each head and step, of each key channel, too (GLA), or of each head alone (retention);
            -inf forgets everything.
        scale: Of the products; None means `1 / sqrt(K)`.
        reverse: Scan from the last step to the first: the flipped result for flipped inputs.
        initial_state: Before the first step (after the last one when reversed); zeros by default.
        return_state: Return the state after the last step, too, in float32.
        cu_seqlens: int32 bounds of packed sequences, from 0 to L. B is 1 then.

    Shape:
        q `[B, L, Hq, K]`, k `[B, L, Hk, K]`, v and the result `[B, L, H, V]`; Hq and Hk divide H; log_decay
        `[B, L, H]`, `[B, L, H, K]` or `[H]`; states `[S, H, K, V]`, S the batch or the number of packed
        sequences; cu_seqlens `[S + 1]`.

    Returns:
        The outputs in v's dtype; with `return_state` also the states.

    Raises:
        TypeError: q, k, v are not of one floating dtype, or another tensor's dtype is wrong.
        ValueError: A shape, a device or cu_seqlens is wrong.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Retention: Sun et al. 2023 (arXiv 2307.08621). GLA: Yang et al. 2023 (arXiv 2312.06635). SSD: Dao and
        Gu 2024 (arXiv 2405.21060).

    Example:
        >>> q = k = v = torch.randn(2, 100, 4, 16)
        >>> gates = torch.nn.functional.logsigmoid(torch.randn(2, 100, 4))
        >>> out, state = decay_attention(q, k, v, gates, return_state=True)
        >>> out.shape, state.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 16, 16]))
    """
    _check(q, k, v, log_decay)
    check_states("decay_attention", q, k, v, initial_state, cu_seqlens)
    backend = choose("decay_attention", device=q.device.type, dtype=q.dtype, **features(q, v, log_decay))
    if backend.backend == "reference":
        return reference.decay_attention(
            q, k, v, log_decay, scale=scale, reverse=reverse, initial_state=initial_state,
            return_state=return_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    out, state = run(q, k, v, log_decay, scale, reverse, initial_state, cu_seqlens, backend.backend)
    return (out, state) if return_state else out


def decay_attention_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Take one step of `decay_attention`, for streaming.

    Args:
        state: After the steps before; zeros at first. It is not changed.
        q, k, v, log_decay, scale: As in `decay_attention`, of one step.

    Shape:
        state `[B, H, K, V]`; q `[B, Hq, K]`, k `[B, Hk, K]`, v and the output `[B, H, V]`; log_decay
        `[B, H]`, `[B, H, K]` or `[H]`.

    Returns:
        The output in v's dtype, and the new state, float32.

    Raises:
        TypeError, ValueError: As `decay_attention`.
    """
    if v.dim() != 3 or q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"decay_attention_step: q, k and v must be [B, heads, dim], not "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    decay = log_decay if log_decay.dim() == 1 else log_decay[:, None]
    _check(q[:, None], k[:, None], v[:, None], decay)
    check_states("decay_attention_step", q[:, None], k[:, None], v[:, None], state, None)
    return _step(state, q, k, v, log_decay, scale=scale)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    reverse: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the chunked op on checked arguments; log_decay None means no decay. Outputs and last states."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = v.shape[2]
    if q.shape[2] != k.shape[2] or (log_decay is not None and log_decay.dim() == 4):
        most = max(q.shape[2], k.shape[2])
        vector = log_decay is not None and log_decay.dim() == 4
        alike = heads if vector or q.shape[2] * k.shape[2] % most else most
        q, k = (x.repeat_interleave(alike // x.shape[2], 2) if x.shape[2] != alike else x for x in (q, k))
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*v.shape[:2], heads)
    if v.numel() == 0 or q.numel() == 0:
        return _nothing(q, v, initial_state, cu_seqlens)
    out, state, _ = decay_attention_op(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse, backend)
    return out, state


def features(q: Tensor, v: Tensor, log_decay: Tensor | None) -> dict[str, bool | int | str]:
    """What the clauses ask about."""
    widest = max(q.shape[-1], v.shape[-1])
    # In words: torch.compile, for which sizes may be symbols, takes these for constants.
    return {
        "vector": log_decay is not None and log_decay.dim() == 4,
        "width": "wide" if widest > MAX_WIDTH else "usual",
    }


def _nothing(
    q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """No steps, or no channels: what is read is zero, and states stay as they are."""
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, v.shape[2], q.shape[3], v.shape[3])
    start = v.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    return v * 0 + q.sum() * 0, start.clone()


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    check_inputs("decay_attention", q, k, v)
    if not log_decay.is_floating_point():
        raise TypeError(f"decay_attention: log_decay must be floating, not {log_decay.dtype}")
    allowed = [v.shape[:3], (*v.shape[:3], q.shape[3]), v.shape[2:3]]
    if log_decay.shape not in [torch.Size(x) for x in allowed]:
        raise ValueError(
            f"decay_attention: log_decay must be [B, L, H], [B, L, H, K] or [H] = "
            f"{' or '.join(str(list(x)) for x in allowed)}, not {list(log_decay.shape)}"
        )
    if log_decay.device != q.device:
        raise ValueError(f"decay_attention: log_decay is on {log_decay.device}, q is on {q.device}")


def check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k and v that do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [B, L, heads, dim], not {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"{op}: q, k and v must have one floating dtype; {name} is {x.dtype}, q is {q.dtype}"
            )
        if x.shape[:2] != v.shape[:2]:
            raise ValueError(
                f"{op}: {name} {list(x.shape)} and v {list(v.shape)} must agree in batch and length"
            )
        if x.shape[2] == 0 or v.shape[2] % x.shape[2]:
            raise ValueError(f"{op}: {name}'s {x.shape[2]} heads must divide v's {v.shape[2]}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q is on {q.device}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must agree in their last axis")


def check_states(
    op: str, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Refuse an initial state, or bounds of packed sequences, that do not fit q, k and v."""
    sequences = q.shape[0]
    if cu_seqlens is not None:
        packed.check(op, cu_seqlens, q.shape[1], batch=q.shape[0])
        sequences = len(cu_seqlens) - 1
    if initial_state is None:
        return
    shape = (sequences, v.shape[2], q.shape[3], v.shape[3])
    if not initial_state.is_floating_point():
        raise TypeError(f"{op}: the initial state must be floating, not {initial_state.dtype}")
    if tuple(initial_state.shape) != shape:
        raise ValueError(f"{op}: the initial state must be {list(shape)}, not {list(initial_state.shape)}")
    if initial_state.device != q.device:
        raise ValueError(f"{op}: the initial state is on {initial_state.device}, q is on {q.device}")
