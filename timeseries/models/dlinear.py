"""DLinear: one linear map for the trend of a series and one for what is left. arXiv 2205.13504."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.models.blocks import series_decomp


class DLinear(nn.Module):
    """Decompose each variate into seasonal part and trend, and map each over time.

    The parameters have the names of the time-series library, whose checkpoints load strictly.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        moving_avg: Steps in the trend's moving average; odd.
        individual: Number of variates that each get maps of their own; None shares one pair among all.

    Shape:
        x `[B, L, N]` -> `[B, P, N]`.

    Source:
        "Are Transformers Effective for Time Series Forecasting?", arXiv 2205.13504.
    """

    def __init__(
        self, seq_len: int, pred_len: int, moving_avg: int = 25, individual: int | None = None
    ) -> None:
        super().__init__()
        self.moving_avg = moving_avg
        self.individual = self.variates = individual
        self.Linear_Seasonal = _maps(seq_len, pred_len, individual)
        self.Linear_Trend = _maps(seq_len, pred_len, individual)

    def forward(self, x: Tensor, x_mark: Tensor | None = None, y_mark: Tensor | None = None) -> Tensor:
        """Forecast; calendar features are ignored.

        Raises:
            ValueError: Maps are individual and the number of variates is not theirs.
        """
        if self.individual is not None and x.shape[-1] != self.individual:
            raise ValueError(
                f"this DLinear has maps for {self.individual} variates; the input has {x.shape[-1]}"
            )
        seasonal, trend = series_decomp(x, self.moving_avg)
        return _over_time(self.Linear_Seasonal, seasonal) + _over_time(self.Linear_Trend, trend)


def dlinear(
    seq_len: int, pred_len: int, moving_avg: int = 25, individual: bool = False, n_variates: int | None = None
) -> DLinear:
    """Build a DLinear.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        moving_avg: Steps in the trend's moving average; odd.
        individual: Whether each variate gets maps of its own.
        n_variates: Number of variates; needed if `individual`, else any number is taken.

    Raises:
        UsageError: `moving_avg` is even, or `individual` lacks `n_variates`.
    """
    if moving_avg < 1 or moving_avg % 2 == 0:
        raise UsageError(f"dlinear: moving_avg must be odd and positive, not {moving_avg}")
    if individual and n_variates is None:
        raise UsageError("dlinear: individual=True needs n_variates, the number of variates")
    return DLinear(seq_len, pred_len, moving_avg, n_variates if individual else None)


def _maps(seq_len: int, pred_len: int, individual: int | None) -> nn.Linear | nn.ModuleList:
    if individual is not None:
        return nn.ModuleList(_averaging(seq_len, pred_len) for _ in range(individual))
    return _averaging(seq_len, pred_len)


def _averaging(seq_len: int, pred_len: int) -> nn.Linear:
    """A map that starts as the mean of the history."""
    linear = nn.Linear(seq_len, pred_len)
    nn.init.constant_(linear.weight, 1 / seq_len)
    return linear


def _over_time(maps: nn.Module, x: Tensor) -> Tensor:
    if isinstance(maps, nn.Linear):
        return maps(x.mT).mT
    linears = [each for each in maps.children() if isinstance(each, nn.Linear)]
    weight = torch.stack([linear.weight for linear in linears])  # [N, P, L]
    bias = torch.stack([linear.bias for linear in linears])  # [N, P]
    return torch.einsum("npl,bln->bpn", weight, x) + bias.mT
