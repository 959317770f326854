"""The row norms as one `torch.library` op, so that torch.compile, torch.export and opcheck know them.

Forward and backward are an op each; both have a CPU kernel, a Triton kernel and a fake kernel. In Triton's
interpreter CPU tensors go to the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.dispatch import interpreting
from manyheads.core.ops.norm import cpu


@torch.library.custom_op("manyheads::norm", mutates_args=())
def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of x + residual; as `cpu.forward`, but z is empty where it would be x itself."""
    if x.is_cuda or interpreting():
        from manyheads.core.ops.norm import triton

        y, z, stats = triton.forward(x, residual, weight, bias, eps, kind)
    else:
        y, z, stats = cpu.forward(x, residual, weight, bias, eps, kind)
    return y, (x.new_empty(0) if residual is None else z), stats


@norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    z = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, z, torch.empty(2, _count(x), dtype=torch.float32, device=x.device)


@torch.library.custom_op("manyheads::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    kind: str,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """Pull the gradients of y and z back to the sum, the weight and the bias; as `cpu.backward`."""
    if z.is_cuda or interpreting():
        from manyheads.core.ops.norm import triton

        return triton.backward(dy, dz, z, stats, weight, kind, affine)
    return cpu.backward(dy, dz, z, stats, weight, kind, affine)


@norm_backward.register_fake
def _(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    kind: str,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    vectors = torch.empty(2 if affine else 0, z.shape[-1], dtype=torch.float32, device=z.device)
    return torch.empty(z.shape, dtype=z.dtype, device=z.device), vectors


def _count(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, ctx.kind = inputs
    _, z, stats = output
    ctx.save_for_backward(x if residual is None else z, stats, weight)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dy: Tensor | None, dz: Tensor | None, dstats: Tensor | None) -> tuple[Any, ...]:
    z, stats, weight = ctx.saved_tensors
    x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
    if residual_dtype is None:
        dz = None  # of the empty placeholder
    if dy is None:  # only the sum was used
        return _as(dz, x_dtype), _as(dz, residual_dtype), None, None, None, None
    _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    out, vectors = norm_backward(dy, dz, z, stats, weight, ctx.kind, needs_weight or needs_bias)
    return (
        _as(out, x_dtype),
        _as(out, residual_dtype),
        _as(vectors[0], weight_dtype) if needs_weight else None,
        _as(vectors[1], bias_dtype) if needs_bias else None,
        None,
        None,
    )


def _as(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if grad is None or dtype is None else grad.to(dtype)


norm.register_autograd(_pull_back, setup_context=_setup)
