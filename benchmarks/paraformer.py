"""Paraformer-large against funasr's, with the same random weights, from samples to tokens.

10 s of audio (a line's milliseconds / 10,000 are the real-time factor), and 16 recordings of 1 to 10 s in one
batch: packed against padded, ours and funasr's. funasr is no dependency: see `benchmarks.peers`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import Case, difference, inference
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.paraformer import Paraformer, Recognised, paraformer_large

RATE, SECONDS = 16000, 10
OWN = f"the same, padded, torch {torch.__version__}"


def best(logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens' log probabilities, zero behind a row's count, and the counts."""
    inside = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    return logits.log_softmax(-1).amax(-1) * inside, counts.float()


def recordings(device: str) -> tuple[Tensor, Tensor]:
    """16 recordings of 1 to 10 s: noise, zero behind their ends, and their numbers of samples."""
    lengths = torch.linspace(RATE, SECONDS * RATE, 16).long()
    waves = torch.randn(16, SECONDS * RATE) * 0.1
    return waves.masked_fill(torch.arange(waves.shape[1]) >= lengths[:, None], 0.0).to(device), lengths


def cases(device: str) -> Iterator[Case]:
    """Yield the lines: a single recording, then the batch."""
    model, front = paraformer_large().eval().to(device), FrontEnd()
    theirs = peers.funasr_paraformer().to(device) if peers.is_installed("funasr") else None
    if theirs is None:
        print("funasr is not installed: its lines are left out (see benchmarks/peers.py)")
    else:
        model.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    wave = torch.randn(1, SECONDS * RATE, device=device) * 0.1

    def padded(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return told(model, front, waves, lengths, packed=False)

    def packed(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return told(model, front, waves, lengths, packed=True)

    many, counts = recordings(device)
    shape = f"B16 1 to {SECONDS} s"
    if theirs is not None:
        label, frames = peers.label("funasr"), peers.funasr_front_end()

        def peer(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            rows, spans = frames(waves, lengths)
            encoded, spans = theirs.encode(rows, spans)
            tokens, numbers, _, _ = theirs.calc_predictor(encoded, spans)
            numbers = numbers.round().long()
            logs, _ = theirs.cal_decoder_with_predictor(encoded, spans, tokens, numbers)
            return best(logs, numbers)

        one = torch.tensor([SECONDS * RATE])
        a, b = inference(padded, wave, one), inference(peer, wave, one)
        yield Case("paraformer_large", f"B1 {SECONDS} s", label, a, b, 1.3, difference(a, b))
        # funasr's batch lets padding into its recordings: its numbers are others there.
        yield Case(
            "paraformer_large packed", shape, f"{label}, padded", inference(packed, many, counts),
            inference(peer, many, counts), 1.6,
        )  # fmt: skip
    a, b = inference(packed, many, counts), inference(padded, many, counts)
    yield Case("paraformer_large packed", shape, OWN, a, b, 1.6, difference(a, b))


def told(
    model: Paraformer, front: FrontEnd, waves: Tensor, lengths: Tensor, packed: bool
) -> tuple[Tensor, Tensor]:
    """Recognise recordings."""
    rows, spans = front.batch([wave[:n] for wave, n in zip(waves, lengths.tolist(), strict=True)])
    found: Recognised = model.packed(rows, spans) if packed else model(rows, spans)
    return best(found.logits, found.counts)
