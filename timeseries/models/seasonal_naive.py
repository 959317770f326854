"""The seasonal naive forecast: the last season, repeated. Any model worth its parameters beats it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError


class SeasonalNaive(nn.Module):
    """Repeat the last `season_length` observed steps over the horizon.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        season_length: Steps in a season; 1 repeats the last value.

    Shape:
        x `[B, L, N]` -> `[B, P, N]`.

    Example:
        >>> SeasonalNaive(seq_len=4, pred_len=3, season_length=2)(torch.arange(4.0).view(1, 4, 1)).flatten()
        tensor([2., 3., 2.])
    """

    steps: Tensor

    def __init__(self, seq_len: int, pred_len: int, season_length: int) -> None:
        super().__init__()
        offsets = torch.arange(pred_len) % season_length
        self.register_buffer("steps", seq_len - season_length + offsets, persistent=False)

    def forward(self, x: Tensor, x_mark: Tensor | None = None, y_mark: Tensor | None = None) -> Tensor:
        """Forecast; calendar features are ignored."""
        return x.index_select(1, self.steps)


def seasonal_naive(seq_len: int, pred_len: int, season_length: int = 24) -> SeasonalNaive:
    """Build the seasonal naive forecast.

    Raises:
        UsageError: The season is longer than the history, or a length is not positive.
    """
    if min(seq_len, pred_len, season_length) < 1:
        raise UsageError("seasonal_naive: seq_len, pred_len and season_length must be positive")
    if season_length > seq_len:
        raise UsageError(
            f"seasonal_naive: season_length={season_length} exceeds seq_len={seq_len}; lengthen seq_len"
        )
    return SeasonalNaive(seq_len, pred_len, season_length)
