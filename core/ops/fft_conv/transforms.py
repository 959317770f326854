"""The long convolution by torch's real Fourier transforms, with a backward that shares their spectra.

torch's own backward of a real transform is a complex one of twice the work; here forward takes two real
transforms and one back, and backward one and two back (README.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def convolve(u: Tensor, k: Tensor, k_after: Tensor | None) -> Tensor:
    """y_t = sum over j of k_j u_{t-j}, and of k_after_j u_{t+1+j}; float32 or float64 alike.

    Shape:
        u, y: `[B, L, D]`; k: `[D, K]`, K from 1 to L; k_after: `[D, K']`, K' from 0 to L - 1.
    """
    length, reach = u.shape[1], k.shape[1]
    after = 0 if k_after is None else k_after.shape[1]
    size = fast_size(length + max(reach - 1, after))
    kernel = F.pad(k, (0, size - reach - after))
    if k_after is not None:  # lag -1 is the last entry of a circle
        kernel = torch.cat([kernel, k_after.flip(1)], 1)
    return _Circular.apply(u, kernel)


class _Circular(torch.autograd.Function):
    """The first L entries of the circular convolution of u `[B, L, D]` with k `[D, n]`, n at least L."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor) -> Tensor:
        length, size = u.shape[1], k.shape[1]
        spectrum = torch.fft.rfft(u.transpose(1, 2), n=size)  # [B, D, n/2+1]
        filters = torch.fft.rfft(k)  # [D, n/2+1]
        ctx.sizes = length, size
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(spectrum, filters)
            spectrum = spectrum * filters
        else:
            spectrum.mul_(filters)
        y = torch.fft.irfft(spectrum, n=size)[..., :length]
        return y.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        spectrum, filters = ctx.saved_tensors
        length, size = ctx.sizes
        wants_u, wants_k = ctx.needs_input_grad
        pulled = torch.fft.rfft(dy.transpose(1, 2), n=size)
        du = dk = None
        if wants_u:
            du = torch.fft.irfft(pulled * filters.conj(), n=size)[..., :length].transpose(1, 2).contiguous()
        if wants_k:
            dk = torch.fft.irfft(torch.einsum("bdf,bdf->df", pulled, spectrum.conj()), n=size)
        return du, dk


def fast_size(least: int) -> int:
    """The smallest size from `least` on that is a power of two, or 9, 5, 3 or 15 times one of at least 2.

    Example:
        >>> fast_size(393)
        480
    """
    sizes = [m << max(1, (-(-int(least) // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15)]
    return min(sizes)
