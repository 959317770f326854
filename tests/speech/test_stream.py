"""The streaming API: the same rows however the samples come, latency, ends of utterances, faults."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.models.paraformer import paraformer
from manyheads.speech.models.paraformer_streaming import Chunks, SampleStream
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.recognition.segments import Rules
from manyheads.speech.recognition.stream import ENDPOINTS, Stream
from manyheads.speech.vocabulary import FIRST, Characters

RATE = 16000
NAMES = (*FIRST, "<space>", *"abcdefghijklmnopqrstuvwxyz")


def preprocessing(sample_rate=RATE):
    rows = Features(mels=20).front_end(sample_rate)(talk(10, 99))
    cmvn = torch.stack((-rows.mean(0), 1 / rows.std(0)))
    return Preprocessing.of(sample_rate, Features(mels=20), cmvn, Characters(NAMES))


def tiny(streaming=True):
    """Random weights, so large that different sounds give different text."""
    torch.manual_seed(1)
    model = paraformer(len(NAMES), 140, 32, 2, 64, encoder_blocks=2, decoder_blocks=2, streaming=streaming)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=3 * weight[0].numel() ** -0.5)
    torch.nn.init.normal_(model.predictor.cif_output.weight, std=0.3)
    torch.nn.init.zeros_(model.decoder.output_layer.bias)
    return model.eval()


def talk(seconds=4.0, seed=0, pauses=()):
    """Noise with a slow rhythm, as loud as speech; silence in the pauses (seconds)."""
    generator = torch.Generator().manual_seed(seed)
    count = int(seconds * RATE)
    samples = torch.randn(count, generator=generator) * 0.1
    samples *= 0.6 + 0.4 * torch.sin(torch.arange(count) / RATE * 2 * torch.pi * 3)
    for start, stop in pauses:
        samples[int(start * RATE) : int(stop * RATE)] *= 1e-3
    return samples


def pushed(stream, samples, sizes):
    rows, place = [], 0
    for size in sizes:
        rows += stream.push(samples[place : place + size])
        place += size
    assert place >= len(samples)
    return rows + stream.finish()


def at_random(total, most, seed):
    draw = random.Random(seed)
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw.randint(1, most))
    return sizes


@pytest.mark.parametrize("endpoints", ["none", "energy", "silero"])
def test_rows_do_not_depend_on_the_pushes(endpoints):
    samples = talk(5.0, pauses=[(0, 0.7), (2.0, 3.2)])
    rules = replace(ENDPOINTS, threshold=0.0, slack=0.0) if endpoints == "silero" else ENDPOINTS

    def stream():
        return Stream(tiny(), preprocessing(), endpoints=endpoints, rules=rules)

    whole = pushed(stream(), samples, [len(samples)])
    assert any(row["text"] for row in whole)
    for most, seed in ((9, 0), (700, 1), (20000, 2)):
        part = samples[: 20000 if most < 10 else None]
        wanted = whole if len(part) == len(samples) else pushed(stream(), part, [len(part)])
        assert pushed(stream(), part, at_random(len(part), most, seed)) == wanted


def test_is_the_chunked_recognition_of_the_whole():
    samples, tokens = talk(3.3), preprocessing().tokens()
    offline = SampleStream(tiny(), preprocessing().front_end())
    ids = offline.push(samples) + offline.finish()
    rows = pushed(Stream(tiny(), preprocessing()), samples, at_random(len(samples), 3000, 3))
    assert len(ids) > 5
    assert rows[-1] == {
        "segment": 0, "text": tokens.text(ids), "start_ms": 0, "end_ms": 3300, "final": True,
    }  # fmt: skip
    for before, after in pairwise(rows):
        assert after["text"].startswith(before["text"]) and after["end_ms"] >= before["end_ms"]
    assert [row["final"] for row in rows] == [False] * (len(rows) - 1) + [True]


@pytest.mark.parametrize("chunks", [Chunks(), Chunks(size=4, ahead=2), Chunks(before=2, size=8, ahead=0)])
def test_latency_is_as_stated(chunks):
    """Whatever began longer ago than the latency is in the rows that were written, and not much else is."""
    stream, waited = Stream(tiny(), preprocessing(), chunks), []
    samples, step = talk(4.0), 40
    for place in range(0, len(samples), step):
        stream.push(samples[place : place + step])
        if stream.current is not None:
            written = (stream.current.recogniser.features.seen - chunks.ahead) * 960
            waited.append(place + step - written)
    assert stream.latency_ms == (chunks.size + chunks.ahead) * 60
    assert max(waited) + step == stream.latency_ms * 16


def test_latency_with_endpoints():
    stream, waited = Stream(tiny(), preprocessing(), endpoints="energy"), []
    samples, step = talk(4.0), 8
    for place in range(0, len(samples), step):
        stream.push(samples[place : place + step])
        if stream.current is not None:
            written = (stream.current.recogniser.features.seen - 5) * 960
            waited.append(place + step - written - stream.current.start)
    assert stream.latency_ms * 16 - 128 - 2 * step <= max(waited) + step <= stream.latency_ms * 16


def test_endpoints_cut_utterances():
    samples = talk(8.0, pauses=[(0, 1), (3, 4.5), (6.5, 8)])
    rows = pushed(Stream(tiny(), preprocessing(), endpoints="energy"), samples, [len(samples)])
    last = [row for row in rows if row["final"]]
    assert [row["segment"] for row in last] == [0, 1]
    for row, (start, end) in zip(last, [(1000, 3000), (4500, 6500)], strict=True):
        assert start - 260 <= row["start_ms"] <= start
        assert end + 700 <= row["end_ms"] <= end + 1000
    assert last[0]["end_ms"] <= last[1]["start_ms"]
    alone = samples[last[1]["start_ms"] * 16 : last[1]["end_ms"] * 16]
    assert pushed(Stream(tiny(), preprocessing()), alone, [len(alone)])[-1]["text"] == last[1]["text"]


def test_longest_segment():
    rules = replace(ENDPOINTS, longest_ms=1000)
    samples = talk(3.5)
    rows = pushed(Stream(tiny(), preprocessing(), endpoints="energy", rules=rules), samples, [len(samples)])
    last = [row for row in rows if row["final"]]
    assert len(last) == 4
    assert all(b["start_ms"] == a["end_ms"] for a, b in pairwise(last))
    assert all(row["end_ms"] - row["start_ms"] <= 1032 for row in last)
    assert last[-1]["end_ms"] == 3500


def test_silence_and_short_recordings():
    for endpoints in ("energy", "silero"):
        assert pushed(Stream(tiny(), preprocessing(), endpoints=endpoints), torch.zeros(RATE), [RATE]) == []
    assert Stream(tiny(), preprocessing()).finish() == []
    for count in (1, 2, 399, 401):
        rows = pushed(Stream(tiny(), preprocessing()), torch.zeros(count), [count])
        assert [row["final"] for row in rows] == [True] and rows[0]["start_ms"] == 0
    stream = Stream(tiny(), preprocessing())
    assert stream.push(torch.zeros(0)) == [] and stream.push(np.zeros(100, np.float32)) == []


def test_memory_is_flat():
    stream = Stream(tiny(), preprocessing())
    block = talk(9.6)  # 16 chunks

    def held():
        recogniser = stream.current.recogniser
        features = recogniser.features
        kept = [t for past in (*features.encoder_past, *features.decoder_past) if past for t in past]
        kept += [m for m in features.memories if m is not None]
        kept += [features.pending, features.overlap, recogniser.rows.samples, recogniser.rows.frames]
        return sum(each.numel() for each in [*kept, stream.pending])

    sizes = []
    for _ in range(4):
        stream.push(block)
        sizes.append(held())
    assert sizes[1] == sizes[3]


def test_faults():
    stream = Stream(tiny(), preprocessing())
    with pytest.raises(DataError, match="sample 1 is nan"):
        stream.push(torch.tensor([0.0, float("nan")]))
    with pytest.raises(DataError, match="floating-point row"):
        stream.push(np.zeros(10, np.int16))
    with pytest.raises(DataError, match="floating-point row"):
        stream.push(torch.zeros(2, 10))
    assert stream.push(torch.zeros(100)) == []  # a refused push changes nothing
    stream.finish()
    assert stream.finish() == []
    with pytest.raises(DataError, match="has ended"):
        stream.push(torch.zeros(10))
    with pytest.raises(UsageError, match="streaming=True"):
        Stream(tiny(streaming=False), preprocessing())
    with pytest.raises(UsageError, match=r"model\.eval"):
        Stream(tiny().train(), preprocessing())
    with pytest.raises(UsageError, match="Paraformer"):
        Stream(torch.nn.Linear(1, 1), preprocessing())
    with pytest.raises(UsageError, match="did you mean 'energy'"):
        Stream(tiny(), preprocessing(), endpoints="energie")
    with pytest.raises(UsageError, match="8000 and 16000"):
        Stream(tiny(), preprocessing(22050), endpoints="silero")
    with pytest.raises(UsageError, match="longest"):
        Rules(longest_ms=10)
