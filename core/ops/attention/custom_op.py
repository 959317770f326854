"""`manyheads::attention` and its backward: one custom op over the CPU and Triton implementations.

Being custom ops, they are opaque to `torch.compile` and `torch.export`, with fake kernels for their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("manyheads::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    sigmoid: bool,
    dropout_p: float,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, Nq, H, D]`, what the backward needs of each row, with `keep` the weights (CPU).

    Of a row the CPU keeps the log-sum-exp `[B, H, Nq]`, Triton two numbers, `[B, H, Nq, 2]`.
    """
    if backend == "triton":
        from manyheads.core.ops.attention import triton

        found = triton.forward(q, k, v, bias, mask, post_scale, seed, causal, scale, sigmoid, dropout_p)
        return *found, q.new_empty(0)
    from manyheads.core.ops.attention import cpu

    return cpu.forward(
        q, k, v, bias, mask, post_scale, causal=causal, scale=scale, sigmoid=sigmoid, keep=keep
    )  # fmt: skip


@attention_op.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, nq, heads, _dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    backend, keep = rest[-2:]
    rows = (batch, heads, nq)
    if backend == "triton":
        return q.new_empty(q.shape), q.new_empty((*rows, 2), dtype=dtype), q.new_empty(0)
    kept = q.new_empty((*rows, k.shape[1]) if keep else 0, dtype=dtype)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=dtype), kept


@torch.library.custom_op("manyheads::attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    rows: Tensor,
    kept: Tensor,
    causal: bool,
    scale: float,
    sigmoid: bool,
    dropout_p: float,
    backend: str,
    needs_bias: bool,
    needs_post_scale: bool,
) -> list[Tensor]:
    """Return the gradients of q, k and v, then of bias and of post_scale where they are needed."""
    if backend == "triton":
        from manyheads.core.ops.attention import triton

        grads = triton.backward(
            grad, q, k, v, bias, mask, post_scale, seed, out, rows, causal, scale, sigmoid, dropout_p,
            needs_bias=needs_bias, needs_post_scale=needs_post_scale,
        )  # fmt: skip
    else:
        from manyheads.core.ops.attention import cpu

        grads = cpu.backward(
            grad, q, k, v, bias, mask, post_scale, out, rows, kept if kept.numel() else None,
            causal=causal, scale=scale, sigmoid=sigmoid,
            needs_bias=needs_bias, needs_post_scale=needs_post_scale,
        )  # fmt: skip
    return [x for x in grads if x is not None]


@attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
    post_scale: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    needs_bias, needs_post_scale = rest[-2:]
    like = [q, k, v]
    if needs_bias and bias is not None:
        like.append(bias)
    if needs_post_scale and post_scale is not None:
        like.append(post_scale)
    return [x.new_empty(x.shape) for x in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bias, mask, post_scale, seed, *options = inputs
    ctx.save_for_backward(q, k, v, bias, mask, post_scale, seed, *output)
    ctx.options = options[:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    needs_bias, needs_post_scale = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    saved = ctx.saved_tensors
    grads = attention_backward_op(grad, *saved, *ctx.options, needs_bias, needs_post_scale)
    found = iter(grads)
    dq, dk, dv = next(found), next(found), next(found)
    dbias = next(found) if needs_bias else None
    dpost = next(found) if needs_post_scale else None
    return dq, dk, dv, dbias, None, dpost, *(None,) * 7


attention_op.register_autograd(_backward, setup_context=_setup_context)
