"""The long convolution as its defining sum over lags: the truth that the transforms are held to.

Source: the convolution of S4, Gu et al. 2021 (arXiv 2111.00396).
"""

from __future__ import annotations

import torch
from torch import Tensor


def fft_conv(u: Tensor, k: Tensor, k_after: Tensor | None = None) -> Tensor:
    """Add every earlier token, weighed by its lag, and every later one where there is a kernel for them."""
    length = u.shape[1]
    wide = u.dtype if u.dtype == torch.float64 else torch.float32
    tokens = u.to(wide)
    y = torch.zeros(u.shape, dtype=wide, device=u.device)
    for lag in range(min(k.shape[1], length)):
        y = y + _moved(tokens, lag) * k[:, lag].to(wide)
    for j in range(0 if k_after is None else min(k_after.shape[1], length - 1)):
        y = y + _moved(tokens, -1 - j) * k_after[:, j].to(wide)  # type: ignore[index]
    return y.to(u.dtype)


def _moved(x: Tensor, lag: int) -> Tensor:
    """x `lag` tokens later, zeros in the gap."""
    length = x.shape[1]
    gap = torch.zeros_like(x[:, : abs(lag)])
    return torch.cat([gap, x[:, : length - lag]] if lag >= 0 else [x[:, -lag:], gap], 1)
