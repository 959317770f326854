"""How good separated voices are: the scale-invariant ratio (SI-SDR), and which voice is which.

The loss has its own few lines, for batches of unequal lengths; the figures are torchmetrics', as papers use.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

MOST_SPEAKERS = 5  # voices whose orders are all tried: 120 of 5


def pairwise_si_sdr(estimates: Tensor, sources: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the SI-SDR of every estimate for every source, in dB; means are taken out.

    Args:
        estimates, sources: What lies behind a row's length does not count.
        lengths: Samples of each row; None for all.

    Shape:
        estimates, sources `[B, N, L]`; lengths `[B]`; the result `[B, N, N]`: estimates, sources.

    Source:
        arXiv 1811.02508.
    """
    estimates, sources = (_centred(each, lengths) for each in (estimates, sources))
    dots = estimates @ sources.mT  # [B, N, N]
    energy = sources.square().sum(-1)[:, None]  # [B, 1, N]
    whole = estimates.square().sum(-1)[..., None]  # [B, N, 1]
    eps = torch.finfo(dots.dtype).eps
    found = dots.square() / (energy + eps)  # energy of the estimate's part along the source
    return 10 * ((found + eps) / ((whole - found).clamp(min=0) + eps)).log10()


def best_order(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best mean score of all orders of the estimates, and that order.

    Args:
        scores: Of each estimate for each source.

    Shape:
        scores `[B, N, N]`: estimates, sources; the results `[B]`, and `[B, N]`: of each source its estimate.
    """
    count = scores.shape[-1]
    orders = torch.tensor(list(permutations(range(count))), device=scores.device)  # [N!, N]
    means = scores[:, orders, torch.arange(count, device=scores.device)].mean(-1)  # [B, N!]
    best, which = means.max(-1)
    return best, orders[which]


def _centred(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x - x.mean(-1, keepdim=True)
    own = torch.arange(x.shape[-1], device=x.device) < lengths[:, None, None]  # [B, 1, L]
    x = x.masked_fill(~own, 0.0)
    return (x - x.sum(-1, keepdim=True) / lengths[:, None, None]).masked_fill(~own, 0.0)


@dataclass(frozen=True)
class Score:
    """How well one mixture was separated.

    Args:
        si_sdr: Mean over its voices of the separated ones, in the best order, in dB.
        order: Of each source, the estimate that is taken for it.
        voices: SI-SDR of each source's estimate, in dB.
        before: SI-SDR of the mixture for each source, in dB.
    """

    si_sdr: float
    order: list[int]
    voices: list[float]
    before: list[float]

    @property
    def mixture_si_sdr(self) -> float:
        """Mean SI-SDR of the mixture itself, in dB."""
        return sum(self.before) / len(self.before)

    @property
    def improvement(self) -> float:
        """SI-SDRi: how much better than the mixture, in dB."""
        return self.si_sdr - self.mixture_si_sdr


def score(estimates: Tensor, sources: Tensor, mixture: Tensor) -> Score:
    """Measure one separated mixture, as papers do.

    Shape:
        estimates, sources `[N, L]`; mixture `[L]`.
    """
    from torchmetrics.functional.audio import (
        permutation_invariant_training,
        pit_permutate,
        scale_invariant_signal_distortion_ratio,
    )

    best, order = permutation_invariant_training(
        estimates[None],
        sources[None],
        scale_invariant_signal_distortion_ratio,
        mode="speaker-wise",
        eval_func="max",
        zero_mean=True,
    )
    arranged = pit_permutate(estimates[None], order)[0]
    voices = scale_invariant_signal_distortion_ratio(arranged, sources, zero_mean=True)
    before = scale_invariant_signal_distortion_ratio(mixture.expand_as(sources), sources, zero_mean=True)
    return Score(float(best[0]), order[0].tolist(), voices.tolist(), before.tolist())
