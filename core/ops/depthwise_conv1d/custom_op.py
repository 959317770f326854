"""The depthwise convolution as `torch.library` ops, so that torch.compile, torch.export and opcheck know it.

Forward and backward are an op each, with two paths for CPU tensors, Triton kernels for CUDA tensors (and, in
Triton's interpreter, for CPU tensors) and fake kernels.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("manyheads::depthwise_conv1d", mutates_args=())
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    backend: str,
) -> Tensor:
    """Convolve; as `cpu.forward`."""
    y: Tensor = path(backend).forward(x, weight, bias, past, cu_seqlens, left, silu)
    return y


@convolve.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    backend: str,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("manyheads::depthwise_conv1d_backward", mutates_args=())
def convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    vectors: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient of y back; as `cpu.backward`."""
    dx, taps, dpast = path(backend).backward(dy, x, weight, bias, past, cu_seqlens, left, silu, vectors)
    return dx, taps, dpast


@convolve_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    vectors: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = torch.empty(weight.shape[1] + 1, weight.shape[0], dtype=torch.float32, device=x.device)
    shape = (0, 0, 0) if past is None else past.shape
    return dx, taps, torch.empty(shape, dtype=torch.float32, device=x.device)


def path(backend: str) -> Any:
    """The module of a backend, with its `forward` and `backward`."""
    return importlib.import_module(f"manyheads.core.ops.depthwise_conv1d.{backend}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, past, cu_seqlens, ctx.left, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, past, cu_seqlens)


def _pull_back(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: with activation checkpointing a second look is an error
    _, weight, bias, past, _ = saved
    _, wants_weight, wants_bias, wants_past, *_ = ctx.needs_input_grad
    vectors = wants_weight or wants_bias or wants_past
    options = (ctx.left, ctx.silu, vectors, ctx.backend)
    dx, taps, dpast = convolve_backward(dy, *saved, *options)
    return (
        dx,
        taps[:-1].t().to(weight.dtype) if wants_weight else None,
        taps[-1].to(bias.dtype) if wants_bias else None,
        dpast.to(past.dtype) if wants_past else None,
        None,
        None,
        None,
        None,
    )


convolve.register_autograd(_pull_back, setup_context=_setup)
