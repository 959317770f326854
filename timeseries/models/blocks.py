"""Small pieces that several forecasting models share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pointwise(nn.Module):
    """A convolution of width one over channels-last input: a linear map.

    The weight is `[out_features, in_features, 1]`, as this family's checkpoints have it.

    Args:
        in_features: Channels in.
        out_features: Channels out.
        bias: Whether a bias is added.

    Shape:
        `[..., in_features]` -> `[..., out_features]`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Conv1d` does, in the same order."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


def series_decomp(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Split series into what a centred moving average leaves (seasonal) and the average (trend).

    The first and last values are repeated so that the average has the length of the series; a kernel longer
    than the series is allowed.

    Args:
        kernel_size: Steps in the average; odd, since an even one has no centre.

    Shape:
        x `[B, L, N]` -> seasonal `[B, L, N]`, trend `[B, L, N]`.

    Raises:
        ValueError: `kernel_size` is even or not positive.

    Source:
        Autoformer, arXiv 2106.13008, section 3.1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
    half = kernel_size // 2
    # Not F.pad: its replicate mode has no deterministic backward pass on a GPU.
    ends = x[:, :1].expand(-1, half, -1), x[:, -1:].expand(-1, half, -1)
    padded = torch.cat([ends[0], x, ends[1]], dim=1)  # [B, L + 2 half, N]
    trend = F.avg_pool1d(padded.mT, kernel_size, stride=1).mT  # [B, L, N]
    return x - trend, trend
