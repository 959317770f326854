"""Depthwise convolution along a sequence: the public functions and their dispatch.

The mathematics, with the backward's derivation, is in README.md beside this file.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops import packed
from manyheads.core.ops.depthwise_conv1d import custom_op, reference

__all__ = ["depthwise_conv1d", "depthwise_conv1d_step"]


@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    reverse: bool = ...,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor: ...
@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    reverse: bool = ...,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    reverse: bool = ...,
    activation: str | None = ...,
    initial_state: Tensor | None = ...,
    return_state: bool = ...,
    cu_seqlens: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    reverse: bool = False,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel of a sequence with a short filter of its own.

    Causal: `y_t = act(bias + sum_i weight_i x_{t-W+1+i})`, so that the last tap weighs the token itself.
    Not causal: the same length, centred, `y_t = act(bias + sum_i weight_i x_{t-(W-1)//2+i})`; an even width
    reaches one token further ahead than back, as padding="same" has it in torch. Zeros lie outside.

    Args:
        x: float32, bfloat16 or float16 (float64 too, without a kernel); any strides.
        weight, bias: Of any of these dtypes; products and sums are float32.
        causal: No token sees a later one.
        reverse: Run from the end to the beginning: the same as flipping x along L, and y back, without the
            copies. Causal, a token then sees itself and later ones; the states are those of the flipped
            sequence.
        activation: None or "silu".
        initial_state: The inputs before the first, oldest first; None for zeros. Taken in x's dtype.
        return_state: Return the state after the last token too: the last W - 1 inputs.
        cu_seqlens: Where each of S packed sequences begins in L, and where the last one ends (int32); B is
            then 1, and states have S in its place.

    Shape:
        x, y: `[B, L, D]`; weight: `[D, W]`; bias: `[D]`; states: `[B, D, W-1]`; cu_seqlens: `[S+1]`.

    Returns:
        y, in x's dtype; with `return_state` `(y, state)`, the state in x's dtype too.

    Raises:
        TypeError: x is not floating point, or cu_seqlens not int32.
        ValueError: Shapes or options do not fit; a state without `causal`.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Gu and Dao 2023, arXiv 2312.00752 (short, causal, with SiLU); Zhang et al. 2015, arXiv 1512.08301 (the
        memory of FSMN, wide and centred).

    Example:
        >>> y, state = depthwise_conv1d(x, weight, activation="silu", return_state=True)
        >>> next_y, state = depthwise_conv1d_step(token, state, weight, activation="silu")
    """
    _check(x, weight, bias, causal, activation, initial_state, return_state, cu_seqlens)
    return _run(x, weight, bias, initial_state, cu_seqlens, causal, reverse, activation, return_state)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    reverse: bool,
    activation: str | None,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    backend = choose("depthwise_conv1d", device=x.device.type, dtype=x.dtype).backend
    if backend == "reference" or not x.numel():
        return reference.depthwise_conv1d(
            x,
            weight,
            bias,
            causal=causal,
            reverse=reverse,
            activation=activation,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )
    past = None if initial_state is None else initial_state.to(x.dtype).transpose(1, 2)  # [B, W - 1, D]
    y = _forward(x, weight, bias, past, cu_seqlens, causal, reverse, activation == "silu", backend)
    if not return_state:
        return y
    return y, _last(x, past, weight.shape[1] - 1, reverse, cu_seqlens).transpose(1, 2).contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    reverse: bool,
    silu: bool,
    backend: str,
) -> Tensor:
    width = weight.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    if reverse:
        if past is not None:
            past = past.flip(1)
        left, weight = width - 1 - left, weight.flip(1)
    given = (x, weight, bias, past, cu_seqlens, left, silu)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[:4])
    if learns or backend == "triton" or torch.compiler.is_compiling():
        return custom_op.convolve(*given, backend)
    y: Tensor = custom_op.path(backend).forward(*given)  # without gradients it needs no op around it
    return y


def _last(x: Tensor, past: Tensor | None, count: int, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
    """The last `count` inputs of each sequence, and before its first the past: [B, count, D]."""
    if cu_seqlens is None:
        near = min(count, x.shape[1])
        rows = x[:, :near].flip(1) if reverse else x[:, x.shape[1] - near :]
        if near == count:
            return rows
        before = x.new_zeros(x.shape[0], count, x.shape[2]) if past is None else past
        return torch.cat([before[:, near:], rows], 1)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    back = torch.arange(count, 0, -1, device=x.device)  # how far before the end (W-1 .. 1)
    age = back - (ends - starts)  # [S, count]; above 0: before the first token
    at = starts + back - 1 if reverse else ends - back
    inside = (age <= 0)[..., None]
    rows = x[0].index_select(0, at.clamp(0, max(x.shape[1] - 1, 0)).flatten()).view(*at.shape, x.shape[2])
    if past is None:
        return torch.where(inside, rows, 0)
    older = (count - age).clamp(0, max(count - 1, 0))
    before = past.gather(1, older[..., None].expand_as(past))
    return torch.where(inside, rows, before)


def depthwise_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve one more token, causally: the streaming form of `depthwise_conv1d`.

    Args:
        x: The token.
        state: The W - 1 inputs before it, oldest first.
        weight, bias, activation: As `depthwise_conv1d`.

    Shape:
        x, y: `[B, D]`; state: `[B, D, W-1]`; weight: `[D, W]`; bias: `[D]`.

    Returns:
        y, in x's dtype, and the state after the token, in the state's dtype.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes or options do not fit.
    """
    _check(x[:, None], weight, bias, True, activation, state, True, None, "depthwise_conv1d_step")
    window = torch.cat([state, x[..., None].to(state.dtype)], -1)  # [B, D, W]
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype), window[..., 1:]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    causal: bool,
    activation: str | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    op: str = "depthwise_conv1d",
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, not {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be [B, L, D], not {tuple(x.shape)}")
    batch, length, dim = x.shape
    if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must be [{dim}, W], a filter a channel, not {tuple(weight.shape)}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"{op}: bias must be [{dim}], not {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be None or 'silu', not {activation!r}")
    if not causal and (state is not None or return_state):
        raise ValueError(f"{op}: only a causal convolution has a state")
    if cu_seqlens is not None:
        packed.check(op, cu_seqlens, length, batch=batch)
        batch = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (batch, dim, weight.shape[1] - 1):
        wanted = [batch, dim, weight.shape[1] - 1]
        raise ValueError(f"{op}: the state must be {wanted}, not {tuple(state.shape)}")
