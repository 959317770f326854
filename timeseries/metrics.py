"""Exact errors over a whole data set, whatever the batches."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mse(forecast: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error over the targets that are not NaN; 0 if all are.

    Shape:
        forecast, y `[B, P, N]` -> `[]`.
    """
    missing = y.isnan()
    error = torch.where(missing, 0.0, forecast - y)
    return error.square().sum() / (y.numel() - missing.sum()).clamp(min=1)


class ErrorSums:
    """Sums of errors in float64, so that means over all windows are exact; NaN targets are left out."""

    def __init__(self) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64)  # squares, absolute values, targets, windows

    def add(self, forecast: Tensor, y: Tensor) -> None:
        """Add a batch.

        Shape:
            forecast, y `[B, P, N]`.
        """
        missing = y.isnan()
        error = torch.where(missing, 0.0, forecast - y).detach()
        if error.device.type == "mps":  # has no float64
            error, missing = error.cpu(), missing.cpu()
        error = error.double()
        count = (y.numel() - missing.sum()).double()
        sums = [error.square().sum(), error.abs().sum(), count, torch.full_like(count, len(y))]
        self.totals = self.totals.to(error.device) + torch.stack(sums)

    @property
    def mse(self) -> Tensor:
        """Mean squared error; NaN before the first target."""
        return self.totals[0] / self.totals[2]

    @property
    def mae(self) -> Tensor:
        """Mean absolute error; NaN before the first target."""
        return self.totals[1] / self.totals[2]

    @property
    def windows(self) -> Tensor:
        """How many windows were added."""
        return self.totals[3]
