"""Continuous integrate-and-fire without a loop, as sums over bags of rows.

The frames' ends and the tokens' ends, in one order, cut the weights into pieces, each of one frame and of
one token. The pieces of a token follow one another, so the tokens are weighted sums over consecutive pieces,
which `embedding_bag` makes without a copy of the frames, with its gradients. All else is `[B, T + N]`. Plain
torch, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.continuous_integrate_and_fire.reference import SLACK, Fired, FireState


def continuous_integrate_and_fire(
    hidden: Tensor,
    alpha: Tensor,
    *,
    threshold: float,
    lengths: Tensor | None,
    tail: float | None,
    max_tokens: int | None,
    state: FireState | None,
    return_state: bool,
) -> Fired:
    """Cut, then add up; arguments as the public function's."""
    batch, frames, _ = hidden.shape
    ends = torch.full((batch,), frames, device=alpha.device) if lengths is None else lengths.to(alpha.device)
    weights, bad = _weights(alpha, ends, tail)
    before = alpha.new_zeros(batch, dtype=torch.float64) if state is None else state.total
    sums = before[:, None] + weights.cumsum(1)
    places, numbers = _reach(torch.cat((before[:, None], sums), 1) / threshold)  # [B, 1 + T]
    counts = (numbers[:, -1] - numbers[:, 0]).long()
    size = (int(counts.max()) if batch else 0) if max_tokens is None else max_tokens
    shares, frame, starts = _cut(places, numbers[:, 0], counts, size)
    # Bags behind a row's count are empty, but not in a row that is NaN.
    whole = starts[:, : size + 1].gather(1, counts[:, None].clamp(max=size))
    within = torch.arange(size + 1, device=alpha.device) <= counts[:, None]
    within = F.pad(within | bad[:, -1:].isnan(), (0, 1), value=True)
    starts = torch.where(within, starts, whole)
    # The tail and what lies behind a row's end weigh nothing, and point at a frame that counts.
    shares = torch.where(frame < ends[:, None], shares * threshold, 0.0) + bad[:, -1:]
    frame = torch.minimum(frame, (ends - 1).clamp(min=0)[:, None])
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    offset = torch.arange(batch, device=alpha.device)[:, None]
    bags = F.embedding_bag(
        (frame + offset * frames).flatten(),
        wide.reshape(batch * frames, -1),
        (starts + offset * frame.shape[1]).flatten(),
        mode="sum",
        per_sample_weights=shares.to(wide.dtype).flatten(),
    ).view(batch, size + 2, -1)  # the tokens, those beyond max_tokens, what is left
    tokens, left = bags[:, :size], bags[:, -1]
    poison = bad[:, -1:].to(wide.dtype)  # [B, 1]
    left = torch.where((ends == 0)[:, None], poison, left)
    if state is not None:
        begun = state.partial.masked_fill((counts == 0)[:, None], 0.0)
        tokens = torch.cat((tokens[:, :1] + begun[:, None], tokens[:, 1:]), 1) if size else tokens
        left = left + state.partial.masked_fill((counts > 0)[:, None], 0.0)
    ended = numbers[:, 1:] > numbers[:, :-1]
    fires = (places[:, 1:] - numbers[:, 1:] + ended) * threshold + bad
    after = FireState(left, sums[:, -1] + bad[:, -1]) if return_state else None
    return Fired(tokens.to(hidden.dtype), counts, fires.to(wide.dtype), after)


def _weights(alpha: Tensor, ends: Tensor, tail: float | None) -> tuple[Tensor, Tensor]:
    """The weights that count, `[B, T]` in float64; and NaN from the first on that is not finite, else 0."""
    weights = alpha.double()
    if tail is not None:
        weights = F.pad(weights, (0, 1))
    steps = torch.arange(weights.shape[1], device=alpha.device)
    inside = steps < ends[:, None]
    finite = weights.isfinite() | ~inside
    bad = torch.where((~finite).cumsum(1) == 0, 0.0, torch.nan).double()
    weights = torch.where(inside & finite, weights, 0.0)
    return weights if tail is None else weights.masked_fill(steps == ends[:, None], tail), bad


def _before(ordered: Tensor, values: Tensor) -> Tensor:
    """How many of a row's ordered numbers are below each value: `[B, T]` and `[B, U]` to `[B, U]`."""
    if torch.compiler.is_exporting():  # ONNX has no search
        return (ordered[:, None] < values[..., None]).sum(-1)
    return torch.searchsorted(ordered, values)


def _reach(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in thresholds, moved to a token's end that they miss by a hair; how many ends they reach."""
    numbers = (positions.detach() * (1 + SLACK)).floor()
    return positions + (numbers - positions.detach()).clamp(min=0), numbers


def _cut(places: Tensor, first: Tensor, counts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the line at the frames' ends and at size + 1 tokens' ends.

    Args:
        places: The start and each frame's end, `[B, 1 + T]`, in thresholds.
        first: The number of the last token's end before the start, `[B]`.
        counts: How many tokens end, `[B]`.
        size: How many of them are kept; ends beyond a row's count fall on its last.

    Returns:
        The pieces' lengths and frames, `[B, T + size + 1]`, and where in them a bag starts, `[B, size + 2]`.
    """
    start, stops = places[:, :1], places[:, 1:].detach().contiguous()
    nth = torch.arange(1, size + 2, device=places.device).expand(places.shape[0], -1).clone()
    nth[:, size:] = counts[:, None]
    cuts = torch.minimum(nth, counts[:, None]) + first[:, None]
    cuts = torch.where((counts == 0)[:, None], start, cuts)
    # A cut at a frame's very end comes before that end: what the frame may gain goes to the next token.
    rank = _before(stops, cuts.detach()) + torch.arange(size + 1, device=places.device)
    pieces = torch.arange(stops.shape[1] + size + 1, device=places.device)
    is_cut = torch.zeros(places.shape[0], pieces.shape[0], dtype=torch.int64, device=places.device).scatter(
        1, rank, 1
    )
    cut = is_cut.cumsum(1) - is_cut
    frame = pieces - cut
    ends = torch.where(is_cut.bool(), cuts.gather(1, cut.clamp(max=size)), places.gather(1, frame + 1))
    lengths = ends - torch.cat((start, ends[:, :-1]), 1)
    return lengths, frame, F.pad(rank + 1, (1, 0))
