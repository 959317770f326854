"""The depthwise convolution in torch, for CPU tensors: torch's own convolution, without a transposed copy.

`[B, L, D]` is read as an image of one row with its channels last, the layout that torch's CPU library takes
as it is. What lies beside each sequence (its past, or zeros) is laid between the sequences, so that packed
sequences are one convolution too. The gradient of the taps goes tap by tap over blocks of rows in the cache:
torch's own is several times slower, and adds up all rows one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a block of rows: with the shifted rows and their product it stays in a second-level cache.
_BLOCK = 1 << 16


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """y_t = bias + sum over i of weight_i x_{t - left + i}, within each sequence.

    Args:
        past: What lies beside each sequence, on the side of the taps, in the order of x; None for zeros.
        left: How many of the taps lie before the token: 0 or W - 1 where there is a past.
        silu: Apply SiLU.

    Shape:
        x, y: `[B, L, D]`; weight: `[D, W]`; bias: `[D]`; past: `[B or S, W - 1, D]`; cu_seqlens: `[S + 1]`.
    """
    reach = weight.shape[1] - 1
    if past is None and cu_seqlens is None and reach == 2 * left:  # the library's own zeros: no copy of x
        y = _correlate(x.float(), weight, bias, left)
        return (F.silu(y) if silu else y).to(x.dtype).contiguous()
    laid = _lay(x, past, cu_seqlens, left, reach)
    y = _own(_correlate(laid.rows, weight, bias), laid.windows)
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient of y back.

    Args:
        vectors: The gradients of the taps, the bias and the past are wanted too.

    Returns:
        dx in x's dtype; the taps' and, in the last row, the bias's gradients, `[W + 1, D]`; the past's,
        `[S, W - 1, D]`, or empty where there is none. Both are float32, and undefined without `vectors`.
    """
    reach = weight.shape[1] - 1
    laid = _lay(x, past, cu_seqlens, left, reach)
    dz = dy.float()
    if silu:
        z = _own(_correlate(laid.rows, weight, bias), laid.windows)
        s = torch.sigmoid(z)
        dz = dz * (s + s * (1 - s) * z)
    if laid.windows is not None:  # between the windows of the tokens, nothing
        free = laid.rows.new_zeros(1, laid.rows.shape[1] - reach, x.shape[2])
        dz = free.index_copy_(1, laid.windows, dz)
    pulled = _correlate(F.pad(dz, (0, 0, reach, reach)), weight.flip(1), None)  # [B, of all rows laid, D]
    if laid.windows is None:
        dx = pulled[:, left : left + x.shape[1]]
    else:
        dx = pulled.index_select(1, laid.windows + left)
    dpast = pulled.new_empty(0, 0, 0)
    if past is not None and laid.beside is not None:
        dpast = pulled.index_select(1, laid.beside).reshape(past.shape)
    elif past is not None:
        dpast = pulled[:, :reach] if left else pulled[:, x.shape[1] :]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(dx)
    return dx, _taps(dz, laid.rows, reach + 1, vectors), dpast.clone(memory_format=torch.contiguous_format)


class _Laid(NamedTuple):
    """All rows with what lies beside each sequence; where each token's window, and where the past, begins."""

    rows: Tensor
    windows: Tensor | None = None
    beside: Tensor | None = None


def _lay(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, left: int, reach: int) -> _Laid:
    rows, before = x.float(), None if past is None else past.float()
    if cu_seqlens is None:
        if before is None:
            return _Laid(F.pad(rows, (0, 0, left, reach - left)))
        return _Laid(torch.cat([before, rows] if left else [rows, before], 1))
    starts = cu_seqlens[:-1].long()
    token = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    windows = token + sequence * reach
    laid = rows.new_zeros(1, x.shape[1] + len(starts) * reach, x.shape[2])
    laid.index_copy_(1, windows + left, rows)
    if before is None:
        return _Laid(laid, windows)
    first = starts + torch.arange(len(starts), device=x.device) * reach
    first = first if left else first + cu_seqlens.diff()
    beside = (first[:, None] + torch.arange(reach, device=x.device)).flatten()
    laid.index_copy_(1, beside, before.reshape(1, -1, x.shape[2]))
    return _Laid(laid, windows, beside)


def _correlate(rows: Tensor, weight: Tensor, bias: Tensor | None, zeros: int = 0) -> Tensor:
    """[B, R, D] with [D, W]: [B, R - W + 1, D], and so many rows of zeros before and behind R."""
    image = rows.transpose(1, 2)[:, :, None]  # [B, D, 1, R], channels last
    taps = weight.float()[:, None, None]
    offset = None if bias is None else bias.float()
    with torch.autocast(rows.device.type, enabled=False):  # sums are float32; bfloat16 took minutes
        y = F.conv2d(image, taps, offset, padding=(0, zeros), groups=rows.shape[2])
    return y[:, :, 0].transpose(1, 2)


def _own(y: Tensor, windows: Tensor | None) -> Tensor:
    return y if windows is None else y.index_select(1, windows)


def _taps(dz: Tensor, rows: Tensor, width: int, wanted: bool) -> Tensor:
    """The sums over all rows of dz times x, shifted by each tap; and of dz."""
    batch, length, dim = dz.shape
    total = dz.new_zeros(width + 1, dim)
    size = max(1, _BLOCK // dim)
    for b, start in ((b, s) for b in range(batch if wanted else 0) for s in range(0, length, size)):
        part = dz[b, start : start + size]
        for i in range(width):
            total[i] += (part * rows[b, start + i : start + i + len(part)]).sum(0)
        total[width] += part.sum(0)
    return total
