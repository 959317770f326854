"""When each token was said, from the predictor's weights.

A token begins where the running sum of the weights reaches a whole number, and ends where the next begins, or
after 12 frames; what lies between is silence. Rules and numbers of the published code, Shi et al. 2023 (arXiv
2301.12343), in whole milliseconds: no time is before the recording's start or behind its end, and none before
the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.models.cif import peaks as running_sums

ROW_MS = 60  # from a row of features to the next
REACHED = 1.0 - 1e-4  # a sum that counts as a whole token
SHIFT = -1.5  # frames: a token is heard that much before its weight is complete
EDGE = 5  # frames of silence at the start or end that are told apart
LONGEST = 12  # frames of a token


class Segment(NamedTuple):
    """A token, or None for silence, and its start and end in milliseconds."""

    token: str | None
    start: int
    end: int


def segments(
    alphas: Tensor, fires: Tensor, tokens: Sequence[str], *, parts: int = 3, offset: int = 0
) -> list[Segment]:
    """Place tokens and silences in time.

    Args:
        alphas: Weights of the recording's frames, without padding and tail.
        fires: Their running sums, as `CifPredictor.places` gives them.
        tokens: What was recognised, without the end; it is told by the sum that the weights reach after it.
        parts: Frames in a row of features: 3 for the predictor of timestamps, 1 for the plain one.
        offset: Of the recording's start, in milliseconds.

    Shape:
        alphas and fires `[T]`.

    Returns:
        Silences and tokens in order, each beginning where the last ends.

    Raises:
        DataError: All weights are zero, or one is not finite.
        UsageError: parts do not divide a row's 60 ms.
    """
    if parts < 1 or ROW_MS % parts:
        raise UsageError(f"timestamps: {parts} parts do not divide {ROW_MS} ms")
    if not tokens:
        return []
    places = starts(alphas, fires, len(tokens))
    frame, size = ROW_MS // parts, len(alphas)

    def ms(place: float) -> int:
        return offset + round(min(max(place, 0.0), size) * frame)

    found = [Segment(None, ms(0.0), ms(places[0]))] if places[0] > EDGE else []
    for token, begin, end in zip(tokens, places[:-1], places[1:], strict=True):
        said = min(end, begin + LONGEST)
        found.append(Segment(token, ms(begin), ms(said)))
        if said < end:
            found.append(Segment(None, ms(said), ms(end)))
    last = found.pop()
    if size - places[-1] > EDGE:
        middle = (size + places[-1]) / 2
        return [*found, Segment(last.token, last.start, ms(middle)), Segment(None, ms(middle), ms(size))]
    return [*found, Segment(last.token, last.start, ms(size))]


def timestamps(
    alphas: Tensor, fires: Tensor, tokens: Sequence[str], *, parts: int = 3, offset: int = 0
) -> list[tuple[int, int]]:
    """Start and end of each token in milliseconds; arguments as `segments`."""
    return [
        (start, end)
        for token, start, end in segments(alphas, fires, tokens, parts=parts, offset=offset)
        if token is not None
    ]


def starts(alphas: Tensor, fires: Tensor, tokens: int) -> list[float]:
    """Where the tokens begin and the last one ends, in frames: `tokens + 1` places.

    If the sums do not reach that many whole numbers, the weights are scaled until they do.

    Raises:
        DataError: All weights are zero, or one is not finite.
    """
    found = _reached(fires)
    if len(found) != tokens + 1:
        total = alphas.sum()
        if not total.isfinite() or total <= 0:
            raise DataError(f"timestamps: the weights of {len(alphas)} frames add up to {float(total)}")
        scaled = alphas / (total / (tokens + 1))
        found = _reached(running_sums(scaled[None], REACHED)[0])
        if len(found) != tokens + 1:  # a frame that ends several tokens lets others slip behind the end
            wanted = torch.arange(1, tokens + 2, dtype=torch.float64) * REACHED
            found = torch.searchsorted(scaled.double().cpu().cumsum(0), wanted).clamp(max=len(alphas) - 1)
    return [place + SHIFT for place in found.tolist()]


def _reached(fires: Tensor) -> Tensor:
    return (fires >= REACHED).nonzero()[:, 0]
