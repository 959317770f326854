"""Long convolution along a sequence: the public function and its dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.dispatch import HALF_OR_SINGLE, choose
from manyheads.core.ops.fft_conv import reference, transforms

__all__ = ["fft_conv"]


def fft_conv(u: Tensor, k: Tensor, k_after: Tensor | None = None) -> Tensor:
    """Convolve every channel of a sequence with a kernel as long as the sequence.

    `y_t = sum_{j <= t} k_j u_{t-j}`, and, where there is a kernel of the later tokens,
    `+ sum_j k_after_j u_{t+1+j}`: the token itself belongs to `k` alone, as in the bidirectional S4.

    Args:
        u: float32, bfloat16 or float16 (the transforms are float32), or float64.
        k: The weights of the token itself and of those before it, by lag. What is longer than L has no part.
        k_after: The weights of the tokens after it, nearest first; None for none.

    Shape:
        u, y: `[B, L, D]`; k: `[D, K]`; k_after: `[D, K']`, of any lengths.

    Returns:
        y, in u's dtype.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: Shapes do not fit.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Gu et al. 2021, arXiv 2111.00396; the transforms, Cooley and Tukey 1965.

    Example:
        >>> fft_conv(torch.randn(2, 100, 8), torch.randn(8, 100)).shape
        torch.Size([2, 100, 8])
    """
    _check(u, k, k_after)
    if choose("fft_conv", device=u.device.type, dtype=u.dtype).backend == "reference" or not u.numel():
        return reference.fft_conv(u, k, k_after)
    length = u.shape[1]
    wide = torch.float32 if u.dtype in HALF_OR_SINGLE else u.dtype
    near = k[:, :length].to(wide)
    after = None if k_after is None else k_after[:, : length - 1].to(wide)
    return transforms.convolve(u.to(wide), near, after).to(u.dtype)


def _check(u: Tensor, k: Tensor, k_after: Tensor | None) -> None:
    if u.ndim != 3:
        raise ValueError(f"fft_conv: u must be [B, L, D], not {tuple(u.shape)}")
    for name, tensor in (("u", u), ("k", k), ("k_after", k_after)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"fft_conv: {name} must be floating point, not {tensor.dtype}")
        if name != "u" and (tensor.ndim != 2 or tensor.shape[0] != u.shape[2]):
            raise ValueError(
                f"fft_conv: {name} must be [{u.shape[2]}, K], a row a channel, not {tuple(tensor.shape)}"
            )
    if k.shape[1] == 0:
        raise ValueError("fft_conv: k must weigh the token itself at least")
