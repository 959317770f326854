"""The gated attention unit as `torch.library` ops, for torch.compile, torch.export and opcheck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.gated_attention_unit import cpu


@torch.library.custom_op("manyheads::gated_attention_unit", mutates_args=(), device_types="cpu")
def gated_attention_unit_op(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and gate, and keep what the backward pass reads; as `cpu.forward`."""
    return cpu.forward(quad_q, quad_k, lin_q, lin_k, v, u, mask, lengths, group_size, causal, backend, True)


@gated_attention_unit_op.register_fake
def _(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, dim = v.shape
    dim = dim // 2 if u is None else dim
    count = -(-frames // group_size) if causal else 1
    return (
        torch.empty(batch, frames, dim, dtype=v.dtype, device=v.device),
        torch.empty(batch, frames, 2 * dim, dtype=torch.float32, device=v.device),
        torch.empty(batch, count, lin_k.shape[2], 2 * dim, dtype=torch.float32, device=v.device),
    )


@torch.library.custom_op("manyheads::gated_attention_unit_backward", mutates_args=(), device_types="cpu")
def gated_attention_unit_backward(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
) -> list[Tensor]:
    """Pull the gradient back to the inputs, to v and u as one; as `cpu.backward`."""
    given = (quad_q, quad_k, lin_q, lin_k, v, u)
    return cpu.backward(dy, *given, kept, sums, mask, lengths, group_size, causal, backend)


@gated_attention_unit_backward.register_fake
def _(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
) -> list[Tensor]:
    values = v.shape if u is None else (*v.shape[:2], 2 * v.shape[2])
    shapes = [x.shape for x in (quad_q, quad_k, lin_q, lin_k)]
    return [torch.empty(s, dtype=v.dtype, device=v.device) for s in (*shapes, values)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, mask, lengths, ctx.group_size, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(*given, output[1], output[2], mask, lengths)
    ctx.joined = given[5] is None
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dy: Tensor | None, dkept: Tensor | None, dsums: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 11
    grads = gated_attention_unit_backward(dy, *ctx.saved_tensors, ctx.group_size, ctx.causal, ctx.backend)
    dv, du = (grads[4], None) if ctx.joined else grads[4].chunk(2, -1)
    return *grads[:4], dv, du, None, None, None, None, None


gated_attention_unit_op.register_autograd(_pull_back, setup_context=_setup)
