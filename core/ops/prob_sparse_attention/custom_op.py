"""ProbSparse attention on a CPU as `torch.library` ops, for torch.compile, torch.export and opcheck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.prob_sparse_attention import cpu


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_sample: Tensor | None,
    scale: float,
    causal: bool,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check what no compiled loop does, and compute; as `cpu.forward`."""
    if index_sample is not None and (index_sample.min() < 0 or index_sample.max() >= k.shape[1]):
        raise ValueError(
            f"prob_sparse_attention: index_sample must be in 0..{k.shape[1] - 1}, not "
            f"{index_sample.min()}..{index_sample.max()}"
        )
    return _path(backend).forward(q, k, v, index_sample, scale, causal, count)


@torch.library.custom_op("manyheads::prob_sparse_attention", mutates_args=(), device_types="cpu")
def prob_sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_sample: Tensor | None,
    scale: float,
    causal: bool,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose, attend, fill the rest, and keep what the backward pass reads; as `cpu.forward`."""
    return forward(q, k, v, index_sample, scale, causal, count, backend)


@prob_sparse_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_sample: Tensor | None,
    scale: float,
    causal: bool,
    count: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    return (
        torch.empty(q.shape, dtype=v.dtype, device=v.device),
        torch.empty(batch, heads, count, dtype=torch.int64, device=v.device),
        torch.empty(batch, heads, count, k.shape[1], dtype=torch.float32, device=v.device),
    )


@torch.library.custom_op("manyheads::prob_sparse_attention_backward", mutates_args=(), device_types="cpu")
def prob_sparse_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    weights: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient back to q, k and v; as `cpu.backward`."""
    return _path(backend).backward(dy, q, k, v, chosen, weights, scale, causal)


@prob_sparse_attention_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    weights: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, ctx.scale, ctx.causal, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, output[1], output[2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _pull_back(
    ctx: Any, dy: Tensor | None, dchosen: Tensor | None, dweights: Tensor | None
) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    grads = prob_sparse_attention_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.backend)
    return *grads, None, None, None, None, None


prob_sparse_attention_op.register_autograd(_pull_back, setup_context=_setup)


def _path(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from manyheads.core.ops.prob_sparse_attention import numba

    return numba
