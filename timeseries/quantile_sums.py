"""How good quantiles are over a whole data set, whatever the batches: pinball loss, coverage and width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.timeseries.heads import pinball
from manyheads.timeseries.metrics import intervals


class QuantileSums:
    """Sums over all targets in float64, so that means are exact; NaN targets are left out.

    Args:
        levels: Levels of the quantiles, rising.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels, self.pairs = tuple(levels), intervals(levels)
        # Targets, pinball loss, then for each interval how many it holds and how wide it is.
        self.totals = torch.zeros(2 + 2 * len(self.pairs), dtype=torch.float64)

    def add(self, quantiles: Tensor, y: Tensor) -> None:
        """Add a batch.

        Shape:
            quantiles `[B, P, N, Q]`, y `[B, P, N]`.
        """
        seen = ~y.isnan()
        terms = [seen, pinball(quantiles, y, self.levels)]
        for low, high in self.pairs:
            lower, upper = quantiles[..., low], quantiles[..., high]
            terms += [(lower <= y) & (y <= upper), upper - lower]
        if quantiles.device.type == "mps":  # has no float64
            seen, terms = seen.cpu(), [term.cpu() for term in terms]
        sums = torch.stack([torch.where(seen, term.detach().double(), 0.0).sum() for term in terms])
        self.totals = self.totals.to(sums.device) + sums

    def figures(self) -> dict[str, Tensor]:
        """Return the mean pinball loss over targets and levels, and each interval's coverage and width."""
        means = self.totals[1:] / self.totals[0]
        found = {"pinball": means[0]}
        for i, (low, high) in enumerate(self.pairs):
            share = round(self.levels[high] - self.levels[low], 9)
            found |= {f"coverage_{share:g}": means[1 + 2 * i], f"width_{share:g}": means[2 + 2 * i]}
        return found
