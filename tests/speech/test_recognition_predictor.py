"""Recordings to rows: segments, parts, times, batches, options, and what cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.errors import BadRecord, DataError, ManyheadsError, UsageError
from manyheads.speech import audio
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.paraformer import paraformer, paraformer_conformer
from manyheads.speech.models.paraformer_timestamps import timestamps as published_rule
from manyheads.speech.recognition import decoding, reading
from manyheads.speech.recognition.predictor import Options, Predictor
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.vocabulary import FIRST, Characters

RATE = 16000
NAMES = (*FIRST, "<space>", *"abcdefghijklmnopqrstuvwxyz")


def preprocessing(sample_rate=RATE, **features):
    of = Features(mels=20, **features)
    rows = of.front_end(sample_rate)(talk(10, 99, sample_rate))
    cmvn = torch.stack((-rows.mean(0), 1 / rows.std(0)))
    return Preprocessing.of(sample_rate, of, cmvn, Characters(NAMES))


def tiny(input_size=140, timestamps=False):
    """Random weights, so large that different sounds give different text."""
    torch.manual_seed(1)
    model = paraformer(
        len(NAMES), input_size, 32, 2, 64, encoder_blocks=2, decoder_blocks=2, timestamps=timestamps
    )
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=3 * weight[0].numel() ** -0.5)
    torch.nn.init.normal_(model.predictor.cif_output.weight, std=0.3)
    torch.nn.init.zeros_(model.decoder.output_layer.bias)
    return model.eval()


def predictor(vad="energy", **options):
    return Predictor(tiny(), preprocessing(), Options(vad=vad, **options))


def talk(seconds, seed=0, rate=RATE, pauses=()):
    """Noise with a slow rhythm, as loud as speech, and nothing in the pauses."""
    count = int(seconds * rate)
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(count, generator=generator) * 0.1
    samples *= 0.6 + 0.4 * torch.sin(torch.arange(count) / rate * 2 * torch.pi * (2 + seed % 3))
    for start, stop in pauses:
        samples[int(start * rate) : int(stop * rate)] = 0
    return samples.clamp(-0.99, 0.99)


@pytest.fixture
def folder(tmp_path):
    """Recordings of unequal lengths, rates and channels."""
    audio.write(tmp_path / "a.wav", talk(5, 1, pauses=[(0, 1), (3, 4)]), RATE)
    audio.write(tmp_path / "b/c.flac", talk(2, 2, 44100), 44100) if (tmp_path / "b").mkdir() is None else None
    audio.write(tmp_path / "d.ogg", talk(3.5, 3, 8000, pauses=[(1, 2)]), 8000)
    wide = torch.stack([talk(1.7, 4 + number, 96000) for number in range(6)])
    soundfile.write(tmp_path / "e.wav", wide.T.numpy(), 96000, subtype="FLOAT")
    audio.write(tmp_path / "silence.wav", torch.zeros(RATE * 2), RATE)
    return tmp_path


def seconds_of(path):
    return audio.inspect(path).seconds


def test_rows(folder):
    rows = predictor().predict(str(folder))
    assert list(rows.columns) == list(Predictor.columns)
    assert rows.id.unique().tolist() == ["a.wav", "b/c.flac", "d.ogg", "e.wav", "silence.wav"]
    assert rows.id.value_counts()[["a.wav", "d.ogg"]].tolist() == [2, 2]
    for id, found in rows.groupby("id"):
        longest = int(seconds_of(folder / id) * 1000)
        assert (found.start_ms >= 0).all() and (found.end_ms <= longest).all()
        assert (found.start_ms < found.end_ms).all()
        assert (found.start_ms.iloc[1:].to_numpy() >= found.end_ms.iloc[:-1].to_numpy()).all()
        assert found.segment.tolist() == list(range(len(found))) and (found.part == 0).all()
        for row in found.itertuples():
            times = [each for pair in zip(row.words_start_ms, row.words_end_ms, strict=True) for each in pair]
            assert times == sorted(times) and all(row.start_ms <= each <= row.end_ms for each in times)
            assert " ".join(row.words) == " ".join(row.text.split())
    silent = rows[rows.id == "silence.wav"].iloc[0]
    assert (silent.text, silent.start_ms, silent.end_ms, silent.words) == ("", 0, 2000, [])
    said = rows[rows.id != "silence.wav"]
    texts = said.text[said.text != ""]
    assert len(texts) >= 4 and texts.is_unique
    first = rows.iloc[0]
    assert 800 <= first.start_ms <= 1000 and 3000 <= first.end_ms <= 3200


@pytest.mark.parametrize("vad", ["silero", "energy", "none"])
def test_a_batch_equals_its_records_one_by_one(folder, vad):
    many = predictor(vad, batch_seconds=4)
    if vad == "silero":  # to which noise is no speech
        many.reader.rules = reading.Rules(threshold=0.0, slack=0.0, longest_ms=1500)
    (shard,) = many.shards(str(folder), 100)
    together = [row for rows, _, _ in core.run(many, many.read(shard), 32) for row in rows]
    alone = [row for rows, _, _ in core.run(many, many.read(shard), 1) for row in rows]
    assert together == alone and len(together) >= 5


@pytest.mark.parametrize("timestamps", [False, True])
def test_times_of_words(timestamps):
    model, front_end = tiny(timestamps=timestamps), FrontEnd(mels=20)
    rows = [torch.randn(count, 140) for count in (40, 7, 0, 23, 1)]
    found = decoding.decode(model, front_end, rows, 45)
    assert found[2] == decoding.Decoded() and len(found[0].ids) > 3
    for each, alone in zip(found, rows, strict=True):
        assert each == decoding.decode(model, front_end, [alone], 45)[0]
        assert len(each.ids) == len(each.spans)
        times = [time for span in each.spans for time in span]
        assert times == sorted(times) and all(0 <= time <= 60 * len(alone) + 400 for time in times)
    if timestamps:
        halves = decoding.decode(model, replace(front_end, stride=3), rows, 45)[0]
        assert halves.spans == tuple((round(a / 2), round(b / 2)) for a, b in found[0].spans)


def test_the_published_rule_is_taken_where_there_is_a_second_predictor():
    model, rows = tiny(timestamps=True), torch.randn(1, 40, 140)
    (found,) = decoding.decode(model, FrontEnd(mels=20), [rows[0]], 45)
    with torch.no_grad():
        out = model(rows)
        places = model.predictor.places(out.encoded, torch.tensor([40]), out.counts)
    ids = out.logits[0].argmax(-1)[: out.counts[0]].tolist()
    ids = ids[:-1] if ids[-1] == 2 else ids
    times = published_rule(places[0][0], places[1][0], [""] * len(ids), parts=3)
    kept = [(id, span) for id, span in zip(ids, times, strict=True) if id > 2]
    assert found == decoding.Decoded(*map(tuple, zip(*kept, strict=True)))


def test_times_around_middles():
    alphas = torch.tensor([0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 1, 0.25, 0.75, 0, 0.45])
    found = decoding.around_middles(alphas, 3, 50.0, 12.5)
    assert found == [(0, 350), (350, 606), (606, 900)]  # middles at 137.5, 562.5 and 650
    assert decoding.around_middles(alphas, 0, 50.0, 12.5) == []
    heavy = decoding.around_middles(torch.tensor([3.2, 0.0]), 3, 60.0, 12.5)  # three tokens in a row
    assert heavy == [(0, 12), (12, 12), (12, 262)]
    assert decoding.around_middles(torch.zeros(3), 2, 60.0, 12.5)[1][1] >= 0  # no weight at all


def test_rows_of_a_conformer_have_four_frames(tmp_path):
    torch.manual_seed(2)
    model = paraformer_conformer(len(NAMES), 20, dim=32, units=64, encoder_blocks=2, decoder_blocks=2).eval()
    torch.nn.init.constant_(model.predictor.cif_output.bias, 1.0)
    audio.write(tmp_path / "x.wav", talk(3, 1), RATE)
    audio.write(tmp_path / "y.wav", talk(1.5, 2), RATE)
    of = Predictor(model, preprocessing(stack=1, stride=1), Options(vad="energy"))
    rows = of.predict(str(tmp_path))
    assert rows.end_ms.tolist() == [3000, 1500]
    for row in rows.itertuples():
        assert len(row.words_end_ms) and row.end_ms - 600 < row.words_end_ms[-1] <= row.end_ms


def test_memory_of_a_batch_is_bounded(monkeypatch):
    sizes, model = [], tiny()
    packed = model.packed
    monkeypatch.setattr(
        model, "packed", lambda x, lengths: sizes.append(lengths.tolist()) or packed(x, lengths)
    )
    segments = [torch.randn(count, 140) for count in (5, 90, 30, 50, 20, 0, 10)]
    found = decoding.decode(model, FrontEnd(mels=20), segments, 80)
    assert sizes == [[90], [50, 30], [20, 10, 5]] and len(found) == 7
    assert list(decoding.groups([], 5)) == [] and list(decoding.groups([0, 0], 5)) == []


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of 6 s instead of ten minutes."""
    monkeypatch.setattr(reading, "PART_S", 6)
    monkeypatch.setattr(reading, "SEARCH_S", 1)
    monkeypatch.setattr("manyheads.speech.recognition.predictor.SHARD_S", 9)


@pytest.mark.parametrize(
    ("suffix", "rate"), [("wav", 16000), ("flac", 22050), ("ogg", 16000), ("mp3", 48000)]
)
def test_parts_make_up_a_long_recording(tmp_path, short_parts, suffix, rate):
    path = tmp_path / f"long.{suffix}"
    audio.write(path, talk(31, 5, rate, [(6.5, 7), (12.2, 12.6), (25, 26)]), rate)
    of = predictor("none")
    shards = of.shards(str(path), 64)
    assert [[unit.part for unit in shard] for shard in shards] == [[0], [1], [2], [3], [4]]
    whole = audio.read(path, RATE)
    records = [list(of.read(shard)) for shard in shards]
    found = torch.cat([record.samples for part in records for record in part])
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert 6500 <= records[1][0].start_ms <= 7000  # at the pause, 300 ms behind where it should end
    for shard, part in list(zip(shards, records, strict=True))[::-1]:  # read alone, by another process
        alone = list(predictor("none").read(shard))
        assert [(each.start_ms, each.end_ms) for each in alone] == [
            (each.start_ms, each.end_ms) for each in part
        ]
        assert all(torch.equal(a.samples, b.samples) for a, b in zip(alone, part, strict=True))
    flat = [record for part in records for record in part]
    assert all(a.end_ms == b.start_ms for a, b in pairwise(flat)) and flat[-1].end_ms == 31000


def test_long_segments_are_cut(tmp_path):
    path = tmp_path / "long.wav"
    audio.write(path, talk(30, 6, pauses=[(8.0, 8.2), (17.1, 17.3)]), RATE)
    rows = predictor("none", segment_seconds=10).predict(str(path))
    assert rows.start_ms.tolist() == [0, *rows.end_ms[:-1]] and rows.end_ms.iloc[-1] == 30000
    assert ((rows.end_ms - rows.start_ms) <= 10000).all()
    assert 8000 <= rows.end_ms[0] <= 8200 and 17100 <= rows.end_ms[1] <= 17300


def test_shards_are_small(tmp_path, short_parts):
    for number in range(10):
        audio.write(tmp_path / f"{number}.wav", talk(2, number), RATE)
    of = predictor()
    assert [len(shard) for shard in of.shards(str(tmp_path), 64)] == [4, 4, 2]
    assert [len(shard) for shard in of.shards(str(tmp_path), 3)] == [3, 3, 3, 1]
    assert of.shards(str(tmp_path), 3) == of.shards(str(tmp_path), 3)


@pytest.mark.parametrize("vad", ["none", "energy"])
def test_a_shard_counts_about_its_segments(tmp_path, vad):
    """A job's time left is of these: a shard of one long recording is not one of 256 short ones."""
    audio.write(tmp_path / "long.wav", talk(90, 6, pauses=[(5 * n - 0.8, 5 * n) for n in range(1, 18)]), RATE)
    audio.write(tmp_path / "short.wav", talk(2, 7), RATE)
    (tmp_path / "text.wav").write_text("no sound")
    of = predictor(vad)
    (shard,) = of.shards(str(tmp_path), 256)
    found = len(list(of.read(shard)))
    assert found == (20 if vad == "energy" else of.count(shard))
    assert of.count(shard) == pytest.approx(found, rel=0.1)
    assert of.count(shard[1:]) == 2


def test_manifests(tmp_path):
    audio.write(tmp_path / "x.wav", talk(6, 7), RATE)
    content = (tmp_path / "x.wav").read_bytes()
    lines = [
        {"audio": "x.wav", "id": "part", "start": 2.5, "end": 4},
        {"audio": "x.wav", "id": "empty", "start": 3, "end": 3},
        {"audio": "x.wav", "id": "behind", "start": 5, "end": 9},
        {"audio": "gone.wav", "id": "gone"},
        {"audio": None, "id": "none"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    of = predictor("none")
    (shard,) = of.shards(str(manifest), 64)
    ((rows, bad, taken),) = core.run(of, of.read(shard), 32)
    assert [(row["id"], row["start_ms"], row["end_ms"]) for row in rows] == [("part", 2500, 4000)]
    assert {each.id: each.reason for each in bad} == {
        "empty": "a part from 3 s to 3 s has no samples",
        "behind": "end 9 s lies behind the recording's 6.000 s",
        "gone": "no such file",
        "none": "the row has no audio",
    }
    assert taken == 5 and sorted(of.named_files(str(manifest))) == [
        str(tmp_path / name) for name in ("gone.wav", "x.wav")
    ]
    frame = of.predict(pd.DataFrame({"audio": [content], "id": ["bytes"]}))
    assert frame.id.tolist() == ["bytes"] and frame.end_ms.tolist() == [6000]


def broken(folder):
    audio.write(folder / "one.wav", torch.zeros(1) + 0.5, RATE)
    bad = talk(1).numpy().copy()
    bad[4000] = np.nan
    soundfile.write(folder / "nan.wav", bad, RATE, subtype="FLOAT")
    audio.write(folder / "cut.wav", talk(2), RATE)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:20000])
    audio.write(folder / "cut.flac", talk(2), RATE)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:20000])
    (folder / "text.wav").write_text("These are words, and no sound.\n" * 100)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), RATE)
    audio.write(folder / "good.wav", talk(2), RATE)


@pytest.mark.parametrize("vad", ["energy", "none"])
def test_broken_recordings_are_set_aside_with_a_reason(tmp_path, vad):
    broken(tmp_path)
    of = predictor(vad)
    (shard,) = of.shards(str(tmp_path), 64)
    ((rows, bad, taken),) = core.run(of, of.read(shard), 32)
    reasons = {each.id: each.reason for each in bad}
    assert [row["id"] for row in rows] == ["good.wav"] and taken == 8
    assert reasons.pop("one.wav") == "too short: 1 samples at 16000 Hz, and it takes 400"
    assert reasons.pop("nan.wav") == "NaN or infinite samples, the first at 0.250 s"
    assert reasons.pop("cut.wav").startswith("truncated") and "truncated" in reasons.pop("cut.flac")
    assert reasons.pop("text.wav").startswith("not audio that can be read")
    assert reasons.pop("empty.wav") == "an empty file" and reasons.pop("nothing.wav") == "it has no samples"
    assert not reasons
    with pytest.raises(DataError, match=r"cut\.flac"):
        of.predict(str(tmp_path))


def test_a_long_recording_with_a_hole(tmp_path, short_parts):
    samples = talk(20, 8).numpy().copy()
    samples[200_000] = np.inf  # 12.5 s
    soundfile.write(tmp_path / "hole.wav", samples, RATE, subtype="FLOAT")
    of = predictor("none")
    found = [record for shard in of.shards(str(tmp_path), 64) for record in of.read(shard)]
    bad = [record for record in found if isinstance(record.samples, BadRecord)]
    assert [record.part for record in found] == [0, 1, 2]
    assert [str(record.samples) for record in bad] == [
        "part 2: NaN or infinite samples, the first at 12.500 s",
        "part 3: NaN or infinite samples, the first at 12.500 s",
    ]


def test_a_recording_that_became_shorter(tmp_path, short_parts):
    audio.write(tmp_path / "x.wav", talk(20), RATE)
    of = predictor("none")
    shards = of.shards(str(tmp_path), 64)
    audio.write(tmp_path / "x.wav", talk(5), RATE)
    (record,) = of.read(shards[-1])
    assert str(record.samples) == "part 3: it became shorter since it was listed"


def test_channels(tmp_path):
    both = torch.stack([talk(2, 1), talk(2, 2)])
    audio.write(tmp_path / "x.wav", both, RATE)
    texts = [predictor(channel=channel).predict(str(tmp_path)).text[0] for channel in ("0", "1", "mix")]
    assert len(set(texts)) == 3
    of = predictor(channel="2")
    (shard,) = of.shards(str(tmp_path), 64)
    ((rows, bad, _),) = core.run(of, of.read(shard), 32)
    assert not rows and bad[0].reason == "no channel 2: it has 2"


def test_options():
    of = predictor()
    assert of.settings == {
        "vad": "energy", "channel": "mix", "batch_seconds": 120, "segment_seconds": 30, "subtitles": "none",
    }  # fmt: skip
    assert Predictor(tiny(), preprocessing()).settings["vad"] == "silero"
    other = core.configure(of, {"vad": "none", "subtitles": "both"})
    assert other.settings["vad"] == "none" and other.settings["subtitles"] == "both"
    for name, value, message in (
        ("vad", "sileros", "did you mean 'silero'"),
        ("subtitles", "sub", "none, srt, vtt, both"),
        ("channel", "left", "a number counted from 0"),
        ("batch_seconds", 0, "at least 1"),
        ("segment_seconds", 700, "1 to 600"),
    ):
        with pytest.raises(UsageError, match=message):
            core.configure(of, {name: value})
    with pytest.raises(UsageError, match="--top-k is no option"):
        core.configure(of, {"top_k": 3})


def test_silero_missing_is_said_before_anything_is_read(tmp_path, monkeypatch):
    audio.write(tmp_path / "x.wav", talk(1), RATE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    of = Predictor(tiny(), preprocessing())
    with pytest.raises(UsageError, match=r"install manyheads\[speech\], or choose vad energy"):
        of.shards(str(tmp_path), 64)


def test_model_folder(tmp_path):
    arguments = {
        "vocab_size": len(NAMES), "input_size": 140, "dim": 32, "heads": 2, "units": 64,
        "encoder_blocks": 2, "decoder_blocks": 2,
    }  # fmt: skip
    audio.write(tmp_path / "x.wav", talk(2), RATE)
    saved = {"domain": "speech", "name": "paraformer", "arguments": arguments}
    hub.save(tmp_path / "model", tiny(), **saved, preprocessing=preprocessing().to_json())
    of = hub.make_predictor(*hub.load_model(tmp_path / "model"))
    wanted = predictor().predict(str(tmp_path / "x.wav"))
    pd.testing.assert_frame_equal(of.predict(str(tmp_path / "x.wav"), vad="energy"), wanted)
    less = Preprocessing.of(RATE, Features(mels=20), None, Characters(NAMES[:-1])).to_json()
    hub.save(tmp_path / "less", tiny(), **saved, preprocessing=less)
    with pytest.raises(ManyheadsError, match="lists 30 units, its model writes 31"):
        hub.make_predictor(*hub.load_model(tmp_path / "less"))


def test_samples_in_memory(tmp_path):
    of, samples = predictor(), talk(3, 1, 44100, pauses=[(0, 0.5)])
    soundfile.write(tmp_path / "x.wav", samples.numpy(), 44100, subtype="FLOAT")
    wanted = of.predict(str(tmp_path / "x.wav")).drop(columns="id")
    assert wanted.text[0]
    for same in (samples, samples.numpy(), samples.double(), torch.stack((samples, samples))):
        found = of.transcribe(same, 44100)
        assert found.id.tolist() == ["samples"]
        pd.testing.assert_frame_equal(found.drop(columns="id"), wanted)
    for bad, message in (
        (samples.short(), "floating-point"),
        (samples[None, None], "floating-point"),
        (torch.zeros(0), "no samples"),
        (samples * float("nan"), "NaN"),
    ):
        with pytest.raises(DataError, match=message):
            of.transcribe(bad, 44100)


def test_stream():
    with pytest.raises(UsageError, match="streaming=True"):
        predictor().stream()
    torch.manual_seed(1)
    model = paraformer(len(NAMES), 140, 32, 2, 64, encoder_blocks=1, decoder_blocks=1, streaming=True)
    stream = Predictor(model, preprocessing()).stream("energy")
    rows = stream.push(talk(1.5)) + stream.finish()
    assert rows[-1]["final"] and rows[-1]["end_ms"] == 1500 and stream.latency_ms > 900


def test_other_rates_and_rows(tmp_path):
    """A model of 8 kHz whose rows are 40 ms apart."""
    audio.write(tmp_path / "x.wav", talk(3, rate=RATE), RATE)
    of = Predictor(tiny(60), preprocessing(8000, stack=3, stride=4), Options(vad="energy"))
    rows = of.predict(str(tmp_path))
    assert rows.end_ms.tolist() == [3000] and max(rows.words_end_ms[0]) <= 3000
    assert max(rows.words_end_ms[0]) > 2000
