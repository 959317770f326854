"""Auto-correlation as its formula: Fourier transforms for the lags, one shifted copy of the values a lag."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.precision import wide

Mode = Literal["batch", "sample", "channel"]
MODES: tuple[str, ...] = get_args(Mode)


def lags(factor: float, length: int, most: int) -> int:
    """How many lags are kept."""
    return min(int(factor * math.log(length)), most)


def fit(x: Tensor, length: int) -> Tensor:
    """Cut a series `[B, S, ...]` to a length, or fill it up with zeros."""
    return F.pad(x[:, :length], (0, 0, 0, 0, 0, max(0, length - x.shape[1])))


def auto_correlation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    mode: Mode = "batch",
    even_lags: bool = False,
) -> Tensor:
    """Compute every channel's correlation; arguments as the public function's."""
    batch, length = q.shape[:2]
    q, k, values = (wide(x) for x in (q, fit(k, length), fit(v, length)))
    spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()  # [B, L // 2 + 1, H, E]
    kept = max(2 * (length // 2), 1) if even_lags else length
    correlation = torch.fft.irfft(spectrum, n=kept, dim=1)  # [B, lags, H, E]
    if mode != "channel":
        correlation = correlation.mean((2, 3), keepdim=True)
    ranked = correlation.mean(0, keepdim=True) if mode == "batch" else correlation
    chosen = ranked.topk(lags(factor, length, kept), dim=1).indices  # [B or 1, lags, H or 1, E or 1]
    weights = correlation.gather(1, chosen.expand(batch, -1, -1, -1)).softmax(1)
    steps = torch.arange(length, device=q.device)[:, None, None]
    positions = (steps + chosen[:, :, None]) % length  # [B or 1, lags, L, H or 1, E or 1]
    every = values[:, None].expand(-1, chosen.shape[1], -1, -1, -1)
    shifted = every.gather(2, positions.expand_as(every))  # [B, lags, L, H, E]
    out = (shifted * weights[:, :, None]).sum(1)
    return out.to(v.dtype)  # [B, L, H, E]
