"""fft_conv against the plain composition of rfft and irfft, and against the direct convolution.

The plain composition is S4's: transforms of twice the length over [B, D, L], with torch's
gradients. The direct one is F.conv1d(groups=D) with a kernel as long as the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import fft_conv


def cases(device: str) -> Iterator[Case]:
    """Yield the lines: two lengths against the composition, a short one against the direct convolution."""
    sizes = [(composed, 4, 1024, 256), (composed, 8, 197, 256), (direct, 1, 197, 64)]
    if device != "cpu":
        sizes = [(composed, 16, 4096, 512), (composed, 64, 197, 384)]
    for peer, batch, length, dim in sizes:
        u = torch.randn(batch, length, dim, device=device)
        k = torch.randn(dim, length, device=device) / length**0.5
        for name, run in (("forward", inference), ("forward+backward", training)):
            steps = run(fft_conv, u, k), run(peer, u, k)
            words = "rfft, irfft" if peer is composed else "F.conv1d(groups=D)"
            yield Case(
                name=f"fft_conv {name}",
                shape=f"B{batch} L{length} D{dim}",
                peer=f"torch {torch.__version__}, {words}",
                ours=steps[0],
                theirs=steps[1],
                difference=difference(*steps),
            )


def composed(u: Tensor, k: Tensor) -> Tensor:
    length = u.shape[1]
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=2 * length) * torch.fft.rfft(k, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2).contiguous()


def direct(u: Tensor, k: Tensor) -> Tensor:
    padded = F.pad(u.transpose(1, 2), (u.shape[1] - 1, 0))
    return F.conv1d(padded, k.flip(1)[:, None], groups=u.shape[2]).transpose(1, 2).contiguous()
