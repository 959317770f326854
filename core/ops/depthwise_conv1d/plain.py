"""The depthwise convolution by torch's own, without a transposed copy.

`[B, L, D]` is read as an image of one row with its channels last, the layout that torch's CPU library takes
as it is. What lies before and after each sequence (its initial state, or zeros) is written between the
sequences, so that packed sequences are one convolution too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """y_t = bias + sum over i of weight_i x_{t - left + i}, within each sequence.

    Args:
        left: How many of the taps lie before the token: 0 or W - 1 where there is a state.
        state: What lies on the taps' side of each sequence, in the order of x; None for zeros.
        silu: Apply SiLU.

    Shape:
        x, y: `[B, L, D]`; weight: `[D, W]`; bias: `[D]`; state: `[B or S, W - 1, D]`; cu_seqlens: `[S + 1]`.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half else x.dtype
    taps, offset = weight.to(wide), None if bias is None else bias.to(wide)
    right = weight.shape[1] - 1 - left
    rows = x.to(wide)
    if cu_seqlens is None:
        padded = F.pad(rows, (0, 0, left, right)) if state is None else _beside(rows, state.to(wide), left)
    else:
        at, room = _places(cu_seqlens, x.shape[1], left, right)
        padded = rows.new_zeros(1, x.shape[1] + len(room) * (left + right), x.shape[2])
        padded = padded.index_copy(1, at + left, rows)
        if state is not None:
            first = room if left else room + cu_seqlens.diff()
            beside = first[:, None] + torch.arange(left + right, device=x.device)
            padded = padded.index_copy(1, beside.flatten(), state.to(wide).reshape(1, -1, x.shape[2]))
    image = padded.transpose(1, 2)[:, :, None]  # [B, D, 1, left + L + right], channels last
    y = F.conv2d(image, taps[:, None, None], offset, groups=x.shape[2])[:, :, 0].transpose(1, 2)
    if cu_seqlens is not None:
        y = y.index_select(1, at)
    return (F.silu(y) if silu else y).to(x.dtype)


def _beside(rows: Tensor, state: Tensor, left: int) -> Tensor:
    return torch.cat([state, rows] if left else [rows, state], 1)


def _places(cu_seqlens: Tensor, length: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Where each token's window, and each sequence's room, begins once every sequence has room around it."""
    token = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    starts = cu_seqlens[:-1].long()
    rooms = torch.arange(len(starts), device=cu_seqlens.device) * (left + right)
    return token + sequence * (left + right), starts + rooms
