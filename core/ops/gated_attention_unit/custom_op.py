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
    u: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and gate, and keep what the backward pass reads; as `cpu.forward`."""
    return cpu.forward(quad_q, quad_k, lin_q, lin_k, v, u, mask, lengths, group_size, causal, keep=True)


@gated_attention_unit_op.register_fake
def _(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, dim = v.shape
    count = -(-frames // group_size) if causal else 1
    single = {"dtype": torch.float32, "device": v.device}
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(2, batch, frames, dim, **single),
        torch.empty(batch, count, 2, lin_k.shape[2], dim, **single),
    )


@torch.library.custom_op("manyheads::gated_attention_unit_backward", mutates_args=(), device_types="cpu")
def gated_attention_unit_backward(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
) -> list[Tensor]:
    """Pull the gradient back to the six inputs; as `cpu.backward`."""
    given = (quad_q, quad_k, lin_q, lin_k, v, u)
    return cpu.backward(dy, *given, kept, sums, mask, lengths, group_size, causal)


@gated_attention_unit_backward.register_fake
def _(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
) -> list[Tensor]:
    given = (quad_q, quad_k, lin_q, lin_k, v, u)
    return [torch.empty(x.shape, dtype=v.dtype, device=v.device) for x in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, mask, lengths, ctx.group_size, ctx.causal = inputs
    ctx.save_for_backward(*given, output[1], output[2], mask, lengths)
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dy: Tensor | None, dkept: Tensor | None, dsums: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 10
    grads = gated_attention_unit_backward(dy, *ctx.saved_tensors, ctx.group_size, ctx.causal)
    return *grads, None, None, None, None


gated_attention_unit_op.register_autograd(_pull_back, setup_context=_setup)
