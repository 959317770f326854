"""Paraformer's losses: smoothed cross-entropy, the error of the token count, CTC.

Source: Gao et al. 2022 (arXiv 2206.08317). The numbers are those of the published code: the smoothed
cross-entropy is a divergence (its least value is 0), and both it and the count's error are divided by the
number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.errors import UsageError
from manyheads.speech.models.glancing import PADDING


@dataclass(frozen=True)
class Objective:
    """What is learnt, and with which weight.

    Attributes:
        smoothing: Share of the true token's mass that all others divide.
        glancing: Share of the first pass' wrong tokens whose number is shown to the second; 0: one pass.
        count: Weight of the token count's error.
        fine_count: Of the second predictor's, where there is one.
        ctc: Weight of CTC on the encoder; the decoder's loss has the rest.
        mwer: Weight of drawn candidates' expected errors, to go on with once a model is trained.
        candidates: Texts that these errors are of.
        per_token: Divide by tokens, not by recordings.

    Raises:
        UsageError: A number is out of its range.
    """

    smoothing: float = 0.1
    glancing: float = 0.75
    count: float = 1.0
    fine_count: float = 0.5
    ctc: float = 0.0
    mwer: float = 0.0
    candidates: int = 4
    per_token: bool = True

    def __post_init__(self) -> None:
        for name in ("smoothing", "ctc"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"objective: {name} must be from 0 to below 1, not {getattr(self, name)}")
        if self.candidates < 2:
            raise UsageError(f"objective: candidates must be 2 or more, not {self.candidates}")
        for name in ("glancing", "count", "fine_count", "mwer"):
            if getattr(self, name) < 0:
                raise UsageError(f"objective: {name} must not be negative, and is {getattr(self, name)}")


def smoothed_cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: float, per_token: bool = True
) -> Tensor:
    """Divergence of the tokens' distribution from one that is smooth around the true token.

    Shape:
        logits `[B, N, V]`; targets `[B, N]`, -1 behind a row's end; the result is a number.
    """
    words = logits.shape[-1]
    off, on = smoothing / (words - 1), 1 - smoothing
    real = targets != PADDING
    logs = logits.log_softmax(-1)
    true = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    cross = -(off * logs.sum(-1) + (on - off) * true)
    entropy = -on * math.log(on) - (smoothing * math.log(off) if smoothing else 0.0)
    losses = (cross - entropy).masked_fill(~real, 0.0)
    return losses.sum() / (real.sum().clamp(min=1) if per_token else len(targets))


def count_error(totals: Tensor, counts: Tensor, per_token: bool = True) -> Tensor:
    """How far the predictor's sums are from the numbers of tokens.

    Shape:
        totals and counts `[B]`; the result is a number.
    """
    missed = (totals - counts.to(totals.dtype)).abs().sum()
    return missed / (counts.sum().clamp(min=1) if per_token else len(counts))


def ctc(logits: Tensor, lengths: Tensor, text: Tensor, text_lengths: Tensor) -> Tensor:
    """Connectionist temporal classification, a recording on average; one too short for its text counts as 0.

    Shape:
        logits `[B, T, V]`, the blank first; lengths and text_lengths `[B]`; text `[B, U]`.
    """
    device = logits.device
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # CUDA's gradient is not
        logits, lengths, text, text_lengths = (x.cpu() for x in (logits, lengths, text, text_lengths))
    logs = logits.log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(
        logs, text.clamp(min=0), lengths, text_lengths, blank=0, reduction="none", zero_infinity=True
    )
    return (losses.sum() / len(text)).to(device)


def with_end(text: Tensor, text_lengths: Tensor, end: int) -> Tensor:
    """The targets: each row's tokens, the end, and -1 behind: `[B, U + 1]`."""
    steps = torch.arange(text.shape[1] + 1, device=text.device)
    targets = F.pad(text, (0, 1), value=PADDING).masked_fill(steps >= text_lengths[:, None], PADDING)
    return targets.masked_fill(steps == text_lengths[:, None], end)
