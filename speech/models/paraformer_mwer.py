"""Minimum word error training: other texts than the best are drawn, and weighed by their errors.

A recogniser that writes all tokens at once has one best path. Others are drawn from it: at some places, by
chance, the best token is taken away and the second best stands there. The loss is the candidates' mean number
of errors under their probabilities, from which their plain mean is taken: it falls as probability moves to
candidates with fewer errors than the others. Source: Gao et al. 2022 (arXiv 2206.08317): negative samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.speech.models.glancing import PADDING


def expected_errors(
    logits: Tensor, targets: Tensor, candidates: int = 4, share: float = 0.2, chance: Tensor | None = None
) -> Tensor:
    """Mean errors of drawn candidates, weighed by probability, less their plain mean; a recording on average.

    Args:
        logits: Of the pass that is trained.
        targets: True tokens, -1 behind a row's end.
        candidates: How many, the best path among them.
        share: Of the tokens of a candidate that are taken away; at least one is.
        chance: Numbers from 0 to 1 for each candidate but the first and each place, if not to be drawn.

    Shape:
        logits `[B, N, V]`; targets `[B, N]`; chance `[B, candidates - 1, N]`; the result is a number.
    """
    real = targets != PADDING
    logs, found = logits.log_softmax(-1).topk(2, -1)  # [B, N, 2]
    if chance is None:
        chance = torch.rand(len(logits), candidates - 1, logits.shape[1], device=logits.device)
    chance = chance.masked_fill(~real[:, None], 2.0)
    swapped = (chance < share) | (chance == chance.amin(-1, keepdim=True))
    swapped = torch.cat((torch.zeros_like(swapped[:, :1]), swapped), 1) & real[:, None]  # [B, S, N]
    tokens = torch.where(swapped, found[:, None, :, 1], found[:, None, :, 0])
    scores = torch.where(swapped, logs[:, None, :, 1], logs[:, None, :, 0])
    weights = scores.masked_fill(~real[:, None], 0.0).sum(-1).softmax(-1)  # [B, S]
    counts = real.sum(1)
    each, sizes = targets.repeat_interleave(tokens.shape[1], 0), counts.repeat_interleave(tokens.shape[1])
    errors = edit_distance(tokens.flatten(0, 1), sizes, each, sizes).view_as(weights).to(weights.dtype)
    return (weights * (errors - errors.mean(1, keepdim=True))).sum(1).mean()


def edit_distance(found: Tensor, found_lengths: Tensor, true: Tensor, true_lengths: Tensor) -> Tensor:
    """The fewest substitutions, deletions and insertions between rows of tokens, all rows at once.

    Shape:
        found `[B, N]`, true `[B, U]`, lengths and the result `[B]`.
    """
    steps = torch.arange(true.shape[1] + 1, device=true.device)
    row = steps.expand(len(true), -1)  # errors of nothing found against the first 0, 1, ... U true tokens
    for place in range(found.shape[1]):
        other = row[:, :-1] + (found[:, place, None] != true)
        best = torch.cat((row[:, :1] + 1, torch.minimum(other, row[:, 1:] + 1)), 1)
        best = (best - steps).cummin(1).values + steps  # a true token left out costs one more than before it
        row = torch.where((place < found_lengths)[:, None], best, row)
    return row.gather(1, true_lengths[:, None])[:, 0]
