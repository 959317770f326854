"""Segments: the rules one by one, and what holds of any recording."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from manyheads.core.errors import UsageError
from manyheads.speech.recognition.segments import (
    Rules,
    Span,
    cut,
    joined,
    padded,
    parts,
    quietest,
    runs,
    segments,
)

RATE, WINDOW = 16000, 512
PLAIN = Rules(shortest_ms=0, pause_ms=0, pad_ms=0, short_ms=0)


def chances(*stretches):
    return torch.cat([torch.full((count,), value) for count, value in stretches])


def test_runs_begin_and_end_at_their_thresholds():
    speech = [0.4, 0.5, 0.36, 0.34, 0.36, 0.34, 0.34, 0.34, 0.9]
    assert runs(speech, PLAIN, 3) == [(1, 5), (8, 9)]
    assert runs(speech, PLAIN, 4) == [(1, 9)]
    assert runs(speech, PLAIN, 0) == [(1, 3), (8, 9)]
    assert runs([], PLAIN, 3) == [] and runs([0.1], PLAIN, 3) == []


def test_short_runs_are_dropped():
    speech = chances((10, 0.0), (4, 1.0), (30, 0.0), (5, 1.0), (30, 0.0))
    rules = replace(PLAIN, shortest_ms=140)
    assert segments(speech, speech, WINDOW, 79 * WINDOW, RATE, rules) == [Span(44 * WINDOW, 49 * WINDOW)]


def test_padding_stays_apart_and_inside():
    spans = [Span(50, 100), Span(110, 200), Span(900, 990)]
    assert padded(spans, 60, 1000) == [Span(0, 105), Span(105, 260), Span(840, 1000)]


def test_joining():
    spans = [Span(0, 10), Span(15, 100), Span(106, 200), Span(201, 205), Span(220, 230)]
    assert joined(spans, 20, 5, 1000) == [Span(0, 100), Span(106, 205), Span(220, 230)]
    assert joined(spans, 20, 5, 99) == [Span(0, 10), Span(15, 100), Span(106, 205), Span(220, 230)]
    assert joined(spans, 0, 5, 1000) == spans


def test_cut_at_the_quietest_place():
    loud = torch.zeros(130)
    loud[40:45], loud[80:85], loud[20:25] = -20.0, -30.0, -60.0  # the last in the first half of the piece
    first, second = 42 * WINDOW + 256, 82 * WINDOW + 256
    pieces = cut(Span(0, 130 * WINDOW), loud, WINDOW, 60 * WINDOW)
    assert pieces == [Span(0, first), Span(first, second), Span(second, 130 * WINDOW)]
    even = cut(Span(0, 100 * WINDOW), torch.zeros(100), WINDOW, 60 * WINDOW)
    assert even[0].stop == 45 * WINDOW + 256  # the middle of equals
    assert cut(Span(5, 60 * WINDOW + 5), loud, WINDOW, 60 * WINDOW) == [Span(5, 60 * WINDOW + 5)]


def test_quietest():
    loud = torch.tensor([-9.0, 0, 0, -8, -8, -8, 0, 0, -90])
    assert quietest(loud, 1, 7, 3) == 4  # the -90 is beyond
    assert quietest(loud, 0, 9, 1) == 8
    assert quietest(loud, 0, 3, 3) == 0 and quietest(torch.zeros(9), 2, 7, 5) == 4


@pytest.mark.parametrize("seed", range(30))
def test_what_holds_of_any_recording(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 3000, (), generator=generator))
    size = count * WINDOW - int(torch.randint(0, WINDOW, (), generator=generator))
    steps = torch.rand(count, generator=generator) < 0.03
    speech = (steps.cumsum(0) % 2 + torch.randn(count, generator=generator) * 0.3).clamp(0, 1)
    loud = torch.rand(count, generator=generator) * -60
    rules = Rules(longest_ms=2000)
    found = segments(speech, loud, WINDOW, size, RATE, rules)
    assert all(isinstance(place, int) for span in found for place in span)
    assert all(0 <= span.start < span.stop <= size and span.stop - span.start <= 32000 for span in found)
    assert all(a.stop <= b.start for a, b in pairwise(found))
    heard = torch.zeros(size, dtype=torch.bool)
    for span in found:
        heard[span.start : span.stop] = True
    sure = [run for run in runs(speech.tolist(), rules, 10) if (run[1] - run[0]) * WINDOW >= 2400]
    for start, stop in sure:
        assert heard[start * WINDOW : min(stop * WINDOW, size)].all()  # no speech is lost


def test_parts_of_a_long_recording():
    assert parts(0, 100) == [0, 0] and parts(149, 100) == [0, 149] and parts(150, 100) == [0, 75, 150]
    ten_hours = 36_000 * RATE
    found = parts(ten_hours + 7, 600 * RATE)
    assert len(found) == 61 and found[-1] == ten_hours + 7
    assert {b - a for a, b in pairwise(found)} <= {600 * RATE, 600 * RATE + 1}


def test_refusals():
    with pytest.raises(UsageError, match="pause_ms must not be negative"):
        Rules(pause_ms=-1)
    with pytest.raises(UsageError, match="at least a second"):
        Rules(longest_ms=999)
