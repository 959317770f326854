"""Segments of unequal lengths through a Paraformer, and the tokens' times from its predictor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manyheads.speech.models.paraformer import Paraformer
from manyheads.speech.models.paraformer_timestamps import ROW_MS, timestamps
from manyheads.speech.tokens import BLANK, END, START, Span

# oneDNN keeps what it compiled for the last 1024 shapes; here every batch has shapes of its own, and memory
# would grow by hundreds of MiB. Both caches read their size at the first product.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")


@dataclass(frozen=True)
class Decoded:
    """What a segment has.

    Args:
        ids: Its tokens, without blank, start and end.
        spans: Start and end of each, in milliseconds of the segment, none before the one before it.
    """

    ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()


def decode(model: Paraformer, segments: Sequence[Tensor], most: int, row_ms: float) -> list[Decoded]:
    """Recognise segments: those of similar lengths together, without their padding.

    Args:
        model: In evaluation mode.
        segments: Features of each, `[T, F]`; one of no rows has no tokens.
        most: Rows that the model sees at once; a longer segment is alone.
        row_ms: From a row to the next.

    Returns:
        What each has, in the segments' order.
    """
    found = [Decoded()] * len(segments)
    weight = next(model.parameters())
    for group in groups([len(each) for each in segments], most):
        features = pad_sequence([segments[i] for i in group], batch_first=True)
        lengths = torch.tensor([len(segments[i]) for i in group], device=weight.device)
        for i, each in zip(
            group, _decode(model, features.to(weight.device, weight.dtype), lengths, row_ms), strict=True
        ):
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


def _decode(model: Paraformer, features: Tensor, lengths: Tensor, row_ms: float) -> Iterator[Decoded]:
    """Recognise one group."""
    parts = max(model.predictor.parts, 1)
    with torch.inference_mode():
        if hasattr(model.encoder, "packed"):
            out = model.packed(features, lengths)
        else:
            out = model(features, lengths)
        alphas, fires = out.alphas, out.fires
        if model.predictor.parts:
            alphas, fires = model.predictor.places(out.encoded, lengths, out.counts)
    best, alphas, fires = out.logits.argmax(-1).cpu(), alphas.float().cpu(), fires.float().cpu()
    for row, (length, count) in enumerate(zip(lengths.tolist(), out.counts.tolist(), strict=True)):
        ids: list[int] = best[row, :count].tolist()
        if ids and ids[-1] == END:
            ids.pop()  # the predictor has a place for it, which is where the last token ends
        size = length * parts
        if not ids or not float(alphas[row, :size].sum()) > 0:
            yield Decoded()
            continue
        times = timestamps(alphas[row, :size], fires[row, :size], list(map(str, ids)), parts=parts)
        kept = [
            (id, (round(start * row_ms / ROW_MS), round(end * row_ms / ROW_MS)))
            for id, (start, end) in zip(ids, times, strict=True)
            if id not in (BLANK, START, END)
        ]
        yield Decoded(tuple(id for id, _ in kept), tuple(span for _, span in kept))
