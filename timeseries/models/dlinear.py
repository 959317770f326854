"""DLinear: one linear map for the trend of a series and one for what is left. arXiv 2205.13504."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.models.blocks import series_decomp
from manyheads.timeseries.models.exogenous import (
    NO_CHANNELS,
    Channels,
    LinearTerm,
    check_extras,
    split_outputs,
)


class DLinear(nn.Module):
    """Decompose each variate into seasonal part and trend, and map each over time.

    The parameters have the names of the time-series library, whose checkpoints load strictly.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        moving_avg: Steps in the trend's moving average; odd.
        individual: Number of variates that each get maps of their own; None shares one pair among all.
        channels: The covariates that it takes; they enter by a linear term.
        outputs: Numbers a step and variate.

    Shape:
        x `[B, L, N]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`, static `[B, Cs]` -> `[B, P, N]`, or
        `[B, P, N, K]` of several outputs.

    Source:
        "Are Transformers Effective for Time Series Forecasting?", arXiv 2205.13504.
    """

    def __init__(
        self,
        seq_len: int,
        pred_len: int,
        moving_avg: int = 25,
        individual: int | None = None,
        channels: Channels = NO_CHANNELS,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.moving_avg, self.channels, self.outputs = moving_avg, channels, outputs
        self.individual = self.variates = individual
        self.Linear_Seasonal = _maps(seq_len, pred_len * outputs, individual)
        self.Linear_Trend = _maps(seq_len, pred_len * outputs, individual)
        self.covariates = LinearTerm(channels, seq_len, pred_len, outputs) if channels else None

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Forecast; calendar features are ignored.

        Raises:
            ValueError: Maps are individual and the number of variates is not theirs, or these are not the
                covariates that the model is built for.
        """
        self.channels.check(past, future, static)
        if self.individual is not None and x.shape[-1] != self.individual:
            raise ValueError(
                f"this DLinear has maps for {self.individual} variates; the input has {x.shape[-1]}"
            )
        x = x if self.covariates is None else self.covariates.explained(x, future)
        seasonal, trend = series_decomp(x, self.moving_avg)
        y = _over_time(self.Linear_Seasonal, seasonal) + _over_time(self.Linear_Trend, trend)
        y = split_outputs(y.mT, self.outputs)
        return y if self.covariates is None else self.covariates(y, past, future, static)


def dlinear(
    seq_len: int,
    pred_len: int,
    moving_avg: int = 25,
    individual: bool = False,
    n_variates: int | None = None,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> DLinear:
    """Build a DLinear.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        moving_avg: Steps in the trend's moving average; odd.
        individual: Whether each variate gets maps of its own.
        n_variates: Number of variates; needed if `individual`, else any number is taken.
        past, future, static: Covariates of each role; a linear term, the same for all variates.
        outputs: Numbers a step and variate.

    Raises:
        UsageError: `moving_avg` is even, `individual` lacks `n_variates`, or a number is negative.
    """
    if moving_avg < 1 or moving_avg % 2 == 0:
        raise UsageError(f"dlinear: moving_avg must be odd and positive, not {moving_avg}")
    if individual and n_variates is None:
        raise UsageError("dlinear: individual=True needs n_variates, the number of variates")
    channels = Channels(past, future, static)
    check_extras("dlinear", channels, outputs, use_norm=False)
    return DLinear(seq_len, pred_len, moving_avg, n_variates if individual else None, channels, outputs)


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
