"""From how likely each window is speech to the segments that are recognised, in whole samples.

Rules, in this order: a run of speech begins at the threshold and ends with a pause; short runs are dropped;
what is left is padded, at most to the middle of the pause; short segments join a neighbour that is close;
what is too long is cut at its quietest places. Nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.errors import UsageError

CALM = 5  # windows over which the quietest place of a segment is averaged
WIDE = 15  # and that between two parts of a long recording


class Span(NamedTuple):
    """A stretch of a recording: from sample `start` to before sample `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Rules:
    """How segments are made.

    Args:
        threshold: A run of speech begins there, and ends `slack` below it.
        slack: See there.
        shortest_ms: Of a run that counts as speech.
        pause_ms: Of silence that ends a run.
        pad_ms: Added on both sides.
        longest_ms: Of a segment.
        short_ms: A segment below it joins a neighbour,
        near_ms: if no more silence than this is between them.

    Raises:
        UsageError: A length is negative, or the longest is below a second.
    """

    threshold: float = 0.5
    slack: float = 0.15
    shortest_ms: int = 150
    pause_ms: int = 500
    pad_ms: int = 150
    longest_ms: int = 30_000
    short_ms: int = 1000
    near_ms: int = 600

    def __post_init__(self) -> None:
        for name in ("shortest_ms", "pause_ms", "pad_ms", "short_ms", "near_ms"):
            if getattr(self, name) < 0:
                raise UsageError(f"segments: {name} must not be negative, and is {getattr(self, name)}")
        if self.longest_ms < 1000:
            raise UsageError(f"segments: the longest must have at least a second, not {self.longest_ms} ms")


def segments(
    speech: Tensor, loud: Tensor, window: int, size: int, sample_rate: int, rules: Rules
) -> list[Span]:
    """Cut a recording into segments of speech.

    Args:
        speech: How likely each window is speech.
        loud: The level of each window, in decibels.
        window: Samples of one.
        size: Samples of the recording; the last window may reach beyond.
        sample_rate: In Hz.
        rules: How.

    Shape:
        speech and loud `[ceil(size / window)]`.
    """

    def samples(ms: int) -> int:
        return ms * sample_rate // 1000

    found = runs(speech.tolist(), rules, -(-samples(rules.pause_ms) // window))
    spans = [Span(start * window, min(stop * window, size)) for start, stop in found]
    spans = [span for span in spans if span.stop - span.start >= samples(rules.shortest_ms)]
    spans = padded(spans, samples(rules.pad_ms), size)
    longest = samples(rules.longest_ms)
    spans = joined(spans, samples(rules.short_ms), samples(rules.near_ms), longest)
    return [piece for span in spans for piece in cut(span, loud, window, longest)]


def runs(speech: Sequence[float], rules: Rules, pause: int) -> list[tuple[int, int]]:
    """Find runs of speech, in windows; `pause` of them without speech end one."""
    found: list[tuple[int, int]] = []
    start, last = -1, -1
    for place, chance in enumerate(speech):
        if chance >= rules.threshold or (start >= 0 and chance >= rules.threshold - rules.slack):
            start, last = place if start < 0 else start, place
        elif start >= 0 and place - last >= max(pause, 1):
            found.append((start, last + 1))
            start = -1
    return [*found, (start, last + 1)] if start >= 0 else found


def padded(spans: Sequence[Span], pad: int, size: int) -> list[Span]:
    """Add samples on both sides: at most to the middle of the pause, and none beyond the recording."""
    found = []
    for number, (start, stop) in enumerate(spans):
        before = (spans[number - 1].stop + start) // 2 if number else 0
        behind = (stop + spans[number + 1].start) // 2 if number + 1 < len(spans) else size
        found.append(Span(max(start - pad, before), min(stop + pad, behind)))
    return found


def joined(spans: Sequence[Span], short: int, near: int, longest: int) -> list[Span]:
    """Join segments of which one is short and that are near one another, to no more than the longest."""
    found: list[Span] = []
    for span in spans:
        if found:
            last = found[-1]
            small = min(last.stop - last.start, span.stop - span.start) < short
            if small and span.start - last.stop <= near and span.stop - last.start <= longest:
                found[-1] = Span(last.start, span.stop)
                continue
        found.append(span)
    return found


def cut(span: Span, loud: Tensor, window: int, longest: int) -> list[Span]:
    """Cut what is longer than the longest at the quietest place of each piece's second half."""
    found, (start, stop) = [], span
    while stop - start > longest:
        low, high = (start + longest // 2) // window + 1, (start + longest) // window - 1
        place = quietest(loud, low, high, CALM) * window + window // 2
        found.append(Span(start, place))
        start = place
    return [*found, Span(start, stop)]


def quietest(loud: Tensor, low: int, high: int, wide: int) -> int:
    """The window from `low` to before `high` around which it is quietest; the middle one of equals.

    Args:
        loud: Levels in decibels.
        low, high: Where to look.
        wide: Windows that are averaged around each, an odd number.
    """
    near = loud[max(low - wide // 2, 0) : high + wide // 2].double()
    left = min(low, wide // 2)
    around = torch.nn.functional.pad(near[None], (wide // 2 - left, wide // 2), mode="replicate")[0]
    means = around.unfold(0, wide, 1).mean(1)[: high - low]
    places = (means <= means.min() + 1e-9).nonzero()[:, 0]
    return low + int(places[len(places) // 2])


def parts(size: int, nominal: int) -> list[int]:
    """Cut a long recording evenly into parts of about a size: where each begins, and the end."""
    count = max(1, (2 * size + nominal) // (2 * nominal))
    return [number * size // count for number in range(count + 1)]
