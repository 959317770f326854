"""Segments of unequal lengths through a Paraformer, and the tokens' times from its predictor.

A model with the second predictor (BiCif) has the published rule for times. Of a plain one each token's
weight gathers around its middle: a token reaches to halfway to its neighbours' middles, and no further than a
quarter of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.cif import LEAST
from manyheads.speech.models.paraformer import Paraformer, Recognised
from manyheads.speech.models.paraformer_timestamps import ROW_MS, timestamps
from manyheads.speech.tokens import BLANK, END, START, Span

HALF_MS = 250  # of a token, to each side of its middle


@dataclass(frozen=True)
class Decoded:
    """What a segment has.

    Args:
        ids: Its tokens, without blank, start and end.
        spans: Start and end of each, in milliseconds of the segment, none before the one before it.
    """

    ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()


def decode(model: Paraformer, front_end: FrontEnd, segments: Sequence[Tensor], most: int) -> list[Decoded]:
    """Recognise segments: those of similar lengths together, without their padding.

    Args:
        model: In evaluation mode.
        front_end: Which made the features.
        segments: Features of each, `[T, F]`; one of no rows has no tokens.
        most: Rows that the model sees at once; a longer segment is alone.

    Returns:
        What each has, in the segments' order.
    """
    found = [Decoded()] * len(segments)
    weight = next(model.parameters())
    for group in groups([len(each) for each in segments], most):
        features = pad_sequence([segments[i] for i in group], batch_first=True)
        lengths = torch.tensor([len(segments[i]) for i in group], device=weight.device)
        with torch.inference_mode():
            out = model.packed(features.to(weight.device, weight.dtype), lengths)
            decoded = _read(model, front_end, out, lengths)
        for i, each in zip(group, decoded, strict=True):
            found[i] = each
    return found


def groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Put what is not empty into groups by length, longest first, of at most so much in sum, or of one."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i))
    held: list[int] = []
    for i in order:
        if held and sum(lengths[j] for j in held) + lengths[i] > most:
            yield held
            held = []
        held.append(i)
    if held:
        yield held


def _read(model: Paraformer, front_end: FrontEnd, out: Recognised, lengths: Tensor) -> list[Decoded]:
    """Read tokens and times out of what the model gave for features of these lengths."""
    spans, alphas, fires = model.encoder.spans(lengths), out.alphas, out.fires
    parts = model.predictor.parts
    if parts:
        alphas, fires = model.predictor.places(out.encoded, spans, out.counts)
    best, alphas, fires = out.logits.argmax(-1).cpu(), alphas.float().cpu(), fires.float().cpu()
    row_ms = front_end.row_ms * model.encoder.stride
    middle = front_end.frame_ms / 2 + front_end.row_ms * (model.encoder.stride - 1)
    found = []
    for row, (size, count) in enumerate(zip(spans.tolist(), out.counts.tolist(), strict=True)):
        ids: list[int] = best[row, :count].tolist()
        if ids and ids[-1] == END:
            ids.pop()  # the predictor has a place for it
        if parts:
            own = alphas[row, : size * parts], fires[row, : size * parts]
            times = _published(*own, len(ids), parts, row_ms)
        else:
            times = around_middles(alphas[row, : size + 1], len(ids), row_ms, middle)
        pairs = zip(ids, times, strict=True)
        kept = [(id, span) for id, span in pairs if id not in (BLANK, START, END)]
        found.append(Decoded(tuple(id for id, _ in kept), tuple(span for _, span in kept)))
    return found


def _published(alphas: Tensor, fires: Tensor, count: int, parts: int, row_ms: float) -> list[Span]:
    """The published rule, whose rows have 60 ms, for rows of any length."""
    if count and not float(alphas.sum()) > 0:
        return [(0, 0)] * count
    found = timestamps(alphas, fires, [""] * count, parts=parts)
    return [(round(start * row_ms / ROW_MS), round(end * row_ms / ROW_MS)) for start, end in found]


def around_middles(alphas: Tensor, count: int, row_ms: float, middle: float) -> list[Span]:
    """Place tokens around the middles of their weights.

    Args:
        alphas: Weights of the rows, the tail's among them.
        count: Tokens.
        row_ms: From a row to the next.
        middle: Of the first row, in milliseconds.

    Shape:
        alphas `[T]`.

    Returns:
        Start and end of each in whole milliseconds, none before the one before it.
    """
    if not count:
        return []
    alphas = alphas.double()
    ends = alphas.cumsum(0)
    tokens = torch.arange(count, dtype=torch.float64)[:, None]
    shares = (torch.minimum(ends, tokens + 1) - torch.maximum(ends - alphas, tokens)).clamp(min=0)
    rows = torch.arange(len(alphas), dtype=torch.float64) * row_ms + middle
    weights = shares.sum(1)
    middles = torch.where(weights > 0, shares @ rows / weights.clamp(min=LEAST), rows[-1])
    middles = middles.cummax(0).values
    between = (middles[1:] + middles[:-1]) / 2
    edge = between.new_tensor([torch.inf])
    starts = torch.maximum(torch.cat((-edge, between)), middles - HALF_MS).clamp(min=0)
    stops = torch.minimum(torch.cat((between, edge)), middles + HALF_MS)
    return list(zip(starts.round().int().tolist(), stops.round().int().tolist(), strict=True))
