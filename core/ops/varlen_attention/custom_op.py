"""`manyheads::varlen_attention` and its backward: one custom op over the CPU and Triton implementations.

Being custom ops, they are opaque to `torch.compile` and `torch.export`, with fake kernels for their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("manyheads::varlen_attention", mutates_args=())
def varlen_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output `[Tq, H, D]` and, with Triton, two numbers of each row, `[Tq, H, 2]`."""
    if backend == "triton":
        from manyheads.core.ops.varlen_attention import triton

        return triton.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, causal, scale)
    from manyheads.core.ops.varlen_attention import cpu

    out = cpu.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, causal=causal, scale=scale)
    return out, out.new_empty(0, dtype=torch.float32)


@varlen_attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = (*q.shape[:2], 2) if rest[-1] == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("manyheads::varlen_attention_backward", mutates_args=())
def varlen_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Tensor,
    causal: bool,
    scale: float,
    backend: str,
    needs_bias: bool,
) -> list[Tensor]:
    """Return the gradients of q, k and v, then of bias where it is needed."""
    inputs = (grad, q, k, v, cu_seqlens_q, cu_seqlens_k, bias)
    if backend == "triton":
        from manyheads.core.ops.varlen_attention import triton

        grads = triton.backward(*inputs, out, rows, causal, scale, needs_bias=needs_bias)
    else:
        from manyheads.core.ops.varlen_attention import cpu

        grads = cpu.backward(*inputs, causal=causal, scale=scale, needs_bias=needs_bias)
    return [x for x in grads if x is not None]


@varlen_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    bias, needs_bias = rest[2], rest[-1]
    like = [q, k, v, bias] if needs_bias and bias is not None else [q, k, v]
    return [x.new_empty(x.shape) for x in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, causal, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (causal, scale, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs_bias = ctx.needs_input_grad[5]
    found = varlen_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options, needs_bias)
    return *found[:3], None, None, found[3] if needs_bias else None, *(None,) * 3


varlen_attention_op.register_autograd(_backward, setup_context=_setup_context)
