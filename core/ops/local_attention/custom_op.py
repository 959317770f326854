"""`manyheads::local_attention` and its backward: one custom op over the CPU and Triton implementations.

Being custom ops, they are opaque to `torch.compile` and `torch.export`, with fake kernels for their shapes.
They compute the rows of tokens that are not global; those of global tokens come as `top`, to be put in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("manyheads::local_attention", mutates_args=())
def local_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    top: Tensor | None,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and, with Triton, two numbers of each row, `[B, H, N, 2]`.

    `index [B, G]` are the global tokens' places (-1: unused), `top [B, G, H, D]` their rows.
    """
    if backend == "triton":
        from manyheads.core.ops.local_attention import triton

        return triton.forward(q, k, v, index, mask, top, window, scale)
    from manyheads.core.ops.local_attention import cpu

    out = cpu.forward(q, k, v, index, mask, top, window=window, scale=scale)
    return out, out.new_empty(0, dtype=torch.float32)


@local_attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _dim = q.shape
    rows = (batch, heads, tokens, 2) if rest[-1] == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("manyheads::local_attention_backward", mutates_args=())
def local_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if backend == "triton":
        from manyheads.core.ops.local_attention import triton

        return triton.backward(grad, q, k, v, index, mask, out, rows, window, scale)
    from manyheads.core.ops.local_attention import cpu

    return cpu.backward(grad, q, k, v, index, mask, window=window, scale=scale)


@local_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, index, mask, _top, *options = inputs
    ctx.save_for_backward(q, k, v, index, mask, *output)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: with activation checkpointing a second look is an error
    index = saved[3]
    grads = local_attention_backward_op(grad, *saved, *ctx.options)
    top = None
    if index is not None and ctx.needs_input_grad[5]:
        batch = torch.arange(len(grad), device=grad.device)[:, None]
        top = grad[batch, index.clamp(min=0)].masked_fill((index < 0)[..., None, None], 0.0)
    return *grads, None, None, top, *(None,) * 3


local_attention_op.register_autograd(_backward, setup_context=_setup_context)
