"""The depthwise convolution as its defining sum over taps: the truth that the other backends are held to.

Sums are float32 (float64 for float64 inputs), whatever the dtype of x.

Source: the short causal convolution of Mamba, Gu and Dao 2023 (arXiv 2312.00752); the memory blocks of FSMN,
Zhang et al. 2015 (arXiv 1512.08301).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Weigh each channel's neighbouring tokens, one sequence of a packed batch after the other."""
    if cu_seqlens is None:
        y, state = _sequences(x, weight, bias, initial_state, causal, reverse, activation)
        return (y, state) if return_state else y
    found = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        past = None if initial_state is None else initial_state[i : i + 1]
        found.append(_sequences(x[:, start:end], weight, bias, past, causal, reverse, activation))
    y = torch.cat([f[0] for f in found], 1)
    return (y, torch.cat([f[1] for f in found])) if return_state else y


def _sequences(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    causal: bool,
    reverse: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Sequences of one length, x [B, L, D]: the convolved x, and its last W - 1 inputs [B, D, W - 1]."""
    if reverse:
        x = x.flip(1)
    length, width = x.shape[1], weight.shape[1]
    past = x.new_zeros(x.shape[0], x.shape[2], width - 1) if state is None else state.to(x.dtype)
    known = torch.cat([past.transpose(1, 2), x], 1)  # [B, W - 1 + L, D]
    state = known[:, length:].transpose(1, 2)
    if not causal:
        left = (width - 1) // 2
        known = F.pad(x, (0, 0, left, width - 1 - left))
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for i in range(width):
        y = y + weight[:, i].to(wide) * known[:, i : i + length].to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype)
    return (y.flip(1) if reverse else y), state
