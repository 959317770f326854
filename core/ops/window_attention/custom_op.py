"""`manyheads::window_attention` and its backward: one custom op over the CPU and Triton implementations.

Being custom ops, they are opaque to `torch.compile` and `torch.export`, with fake kernels for their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.window_attention import cpu
from manyheads.core.ops.window_attention.geometry import Geometry


@torch.library.custom_op("manyheads::window_attention", mutates_args=())
def window_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    shift: list[int],
    grid: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, W, heads, D]` and what Triton's backward needs of each row."""
    where = _geometry(q, window, shift, grid)
    if backend == "triton":
        from manyheads.core.ops.window_attention import triton

        return triton.forward(q, k, v, bias, where, scale)
    return cpu.forward(q, k, v, bias, where, scale, _steps(backend)), _no_rows(q)


@window_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: list[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    if rest[-1] != "triton":
        return q.new_empty(q.shape), _no_rows(q)
    batch, height, width, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, height * width, 2), dtype=torch.float32)


@torch.library.custom_op("manyheads::window_attention_backward", mutates_args=())
def window_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    rows: Tensor,
    window: list[int],
    shift: list[int],
    grid: bool,
    scale: float,
    backend: str,
    needs_bias: bool,
) -> list[Tensor]:
    """Return the gradients of q, k and v, then of the bias where it is needed."""
    where = _geometry(q, window, shift, grid)
    if backend == "triton":
        from manyheads.core.ops.window_attention import triton

        assert out is not None
        grads = triton.backward(grad, q, k, v, bias, out, rows, where, scale, needs_bias)
    else:
        grads = cpu.backward(grad, q, k, v, bias, where, scale, _steps(backend))
    found = list(grads[:3])
    if needs_bias and bias is not None and grads[3] is not None:
        found.append(grads[3].to(bias.dtype))
    return found


@window_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    like = [q, k, v] + ([bias] if rest[-1] and bias is not None else [])
    return [x.new_empty(x.shape) for x in like]


def _geometry(q: Tensor, window: list[int], shift: list[int], grid: bool) -> Geometry:
    return Geometry(q.shape[1], q.shape[2], window[0], window[1], shift[0], shift[1], grid)


def _steps(backend: str) -> cpu.MakeSteps:
    if backend == "numba":
        from manyheads.core.ops.window_attention.numba import NumbaSteps

        return NumbaSteps
    return cpu.TorchSteps


def _no_rows(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, *ctx.options = inputs
    out, rows = output
    # The CPU paths compute whole rows of weights again, and need nothing of the forward's.
    ctx.save_for_backward(q, k, v, bias, out if ctx.options[-1] == "triton" else None, rows)
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs_bias = ctx.needs_input_grad[3]
    grads = window_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options, needs_bias)
    dbias = grads[3] if needs_bias else None
    return grads[0], grads[1], grads[2], dbias, *(None,) * 5


window_attention_op.register_autograd(_backward, setup_context=_setup_context)
