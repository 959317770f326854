"""Continuous integrate-and-fire frame by frame: the plain truth that the parallel form is held to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# How much of itself a sum of weights may miss a token's end by and still have reached it: weights scaled in
# float32 to a sum err by up to six units of 2^-24, those of their own rounding included.
SLACK = 2.0**-20


class FireState(NamedTuple):
    """What integrate-and-fire carries from one stretch of frames to the next.

    Attributes:
        partial: The frames since the last token's end, weighted and added up, `[B, D]`.
        total: The sum of all weights so far, `[B]`, float64.
    """

    partial: Tensor
    total: Tensor


class Fired(NamedTuple):
    """Tokens `[B, N, D]`, how many of them each row has `[B]`, the course of the weights, and the state."""

    tokens: Tensor
    counts: Tensor
    fires: Tensor
    state: FireState | None


def continuous_integrate_and_fire(
    hidden: Tensor,
    alpha: Tensor,
    *,
    threshold: float = 1.0,
    lengths: Tensor | None = None,
    tail: float | None = None,
    max_tokens: int | None = None,
    state: FireState | None = None,
    return_state: bool = False,
) -> Fired:
    """Walk through each row's frames; arguments as the public function's."""
    batch, frames, dim = hidden.shape
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    ends = [frames] * batch if lengths is None else lengths.tolist()
    if state is None:
        state = FireState(wide.new_zeros(batch, dim), alpha.new_zeros(batch, dtype=torch.float64))
    rows = []
    for b, end in enumerate(ends):
        row, weights = wide[b], alpha[b].double()
        if tail is not None:
            row = torch.cat((row, torch.zeros_like(row[:1])))
            weights = torch.cat((weights[:end], weights.new_full((1,), tail), weights[end:]))
        rows.append(_walk(row, weights, end, tail is not None, threshold, state.partial[b], state.total[b]))
    counts = torch.tensor([len(tokens) for tokens, *_ in rows], device=hidden.device)
    size = int(counts.max()) if max_tokens is None and batch else max_tokens or 0
    filled = []
    for tokens, _, partial, total in rows:
        kept = [*tokens[:size], *[wide.new_zeros(dim)] * (size - len(tokens)), partial]
        bad = torch.where(total.detach().isfinite(), 0.0, torch.nan).to(wide.dtype)
        filled.append(torch.stack(kept)[:size] + bad)
    after = FireState(torch.stack([row[2] for row in rows]), torch.stack([row[3] for row in rows]))
    return Fired(
        torch.stack(filled).to(hidden.dtype),
        counts,
        torch.stack([row[1] for row in rows]).to(wide.dtype),
        after if return_state else None,
    )


def _walk(
    row: Tensor, weights: Tensor, end: int, tail: bool, threshold: float, partial: Tensor, total: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """One row's tokens, fires `[T]`, and what is left of it; positions count in thresholds."""
    tokens, fires = [], []
    position = total / threshold
    number = (position.detach() * (1 + SLACK)).floor()
    place = position + (number - position.detach()).clamp(min=0)
    sums = total
    bad = False
    for t, weight in enumerate(weights):
        ended = 0
        if t < end + tail:
            bad = bad or not bool(weight.isfinite())
            sums = sums + (0 if not weight.isfinite() else weight)
            position = sums / threshold
            reached = (position.detach() * (1 + SLACK)).floor()
            stop = position + (reached - position.detach()).clamp(min=0)
            frame = torch.zeros_like(row[0]) if t >= end else row[t]
            while number < reached:  # the token ends in this frame
                number = number + 1
                tokens.append(partial + ((number - place) * threshold).to(row.dtype) * frame)
                partial, place, ended = torch.zeros_like(partial), number, 1
            partial = partial + ((stop - place) * threshold).to(row.dtype) * frame
            place = stop
        fires.append((place - number + ended) * threshold + (torch.nan if bad else 0.0))
    poison = torch.nan if bad else 0.0
    return tokens, torch.stack(fires), partial + poison, sums + poison
