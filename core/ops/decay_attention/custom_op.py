"""`manyheads::decay_attention` and its backward: one custom op over the CPU and Triton implementations.

Forward and backward are an op each, with fake kernels, so that torch.compile, torch.export and opcheck know
them. The states before the chunks are an output, which the backward reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention import cpu
from manyheads.core.ops.decay_attention.chunks import most_chunks
from manyheads.core.ops.decay_attention.fading import Fading, TorchFading


def _fading(backend: str) -> Fading:
    if backend == "numba":
        from manyheads.core.ops.decay_attention.numba import NumbaFading

        return NumbaFading()
    return TorchFading()


@torch.library.custom_op("manyheads::decay_attention", mutates_args=())
def decay_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, L, H, V]`, the last states `[S, H, K, V]` and the states before the chunks.

    The latter are float32, `[G, N, K, H / G, V]` (Triton: `[N, H, K, V]`) for the most chunks N that there
    may be.
    """
    given = (q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse)
    if backend == "triton":
        from manyheads.core.ops.decay_attention import triton

        return triton.forward(*given)
    out, last, states = cpu.forward(*given, _fading(backend))
    missing = _most_chunks(q, log_decay, cu_seqlens) - states.shape[1]
    if missing:
        states = torch.cat([states, states.new_zeros(states.shape[0], missing, *states.shape[2:])], 1)
    return out, last, states


def _most_chunks(q: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> int:
    size = cpu.chunk_size(log_decay)
    if cu_seqlens is not None:
        return most_chunks(q.shape[1], cu_seqlens.shape[0] - 1, size)
    return q.shape[0] * ((q.shape[1] + size - 1) // size)


@decay_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, reverse: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = v.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    chunks, (groups, dim), (heads, width) = _most_chunks(q, log_decay, cu_seqlens), q.shape[2:], v.shape[2:]
    shape = (
        (chunks, heads, dim, width) if backend == "triton" else (groups, chunks, dim, heads // groups, width)
    )
    return v.new_empty(v.shape), last, v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("manyheads::decay_attention_backward", mutates_args=())
def decay_attention_backward_op(
    grad: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scale: float,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of q, k, v and the initial states (float32), then of log_decay where it is."""
    given = (q, k, v, log_decay, cu_seqlens, states, scale, reverse)
    if backend == "triton":
        from manyheads.core.ops.decay_attention import triton

        dq, dk, dv, ddecay, first = triton.backward(grad, grad_last, *given)
    else:
        dq, dk, dv, ddecay, first = cpu.backward(grad, grad_last, *given, _fading(backend))
    return [dq, dk, dv, first] if ddecay is None else [dq, dk, dv, first, ddecay]


@decay_attention_backward_op.register_fake
def _(
    grad: Tensor, grad_last: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    cu_seqlens: Tensor | None, states: Tensor, scale: float, reverse: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = v.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    like = [q, k, v] if log_decay is None else [q, k, v, log_decay]
    found = [x.new_empty(x.shape) for x in like]
    return [*found[:3], first, *found[3:]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, log_decay, cu_seqlens, output[2])
    ctx.initial = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and grad_last is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[2]) if grad is None else grad
    dq, dk, dv, first, *ddecay = decay_attention_backward_op(grad, grad_last, *saved, *ctx.options)
    initial = None if ctx.initial is None else first.to(ctx.initial)
    return dq, dk, dv, ddecay[0] if ddecay else None, initial, None, None, None, None


decay_attention_op.register_autograd(_backward, setup_context=_setup_context)
