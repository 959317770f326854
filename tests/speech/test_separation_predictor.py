"""Separation of recordings: chunked as in one piece, no speaker swapped, batches as single ones, faults."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torchaudio.functional as audio_functional

import manyheads
from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.catalog import create_model
from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.speech import audio
from manyheads.speech.separation import results
from manyheads.speech.separation.predictor import Options, Predictor

_spec = importlib.util.spec_from_file_location("bands", Path(__file__).with_name("bands.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
Bands = _module.Bands  # tests cannot import each other; the jobs' test runs the file as a script

RATE = 8000
TINY = {"num_spks": 2, "dim": 16, "depth": 1, "query_key_dim": 16}
SMALL = Options(chunk_seconds=2, overlap_seconds=1, span_seconds=8)


def talk(seconds, low=True, high=True, seed=0):
    """Two voices: one below 1500 Hz, one from 2100 to 3000 Hz; `[2, L]`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, round(seconds * RATE), generator=generator) / 8
    spectrum = torch.fft.rfft(noise)
    frequency = torch.linspace(0, RATE / 2, spectrum.shape[1])
    spectrum[0, frequency > 1500] = 0
    spectrum[1, (frequency < 2100) | (frequency > 3000)] = 0
    return torch.fft.irfft(spectrum, noise.shape[1]) * torch.tensor([[float(low)], [float(high)]])


def wav(path, samples, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.numpy().T, rate, **{"subtype": "FLOAT", **options})
    return path


def si_sdr(found, source):
    scale = (found @ source) / source.square().sum()
    return 10 * math.log10((scale * source).square().sum() / (found - scale * source).square().sum())


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("mossformer", **TINY)


# ---------------------------------------------------------------- long recordings


def test_chunked_is_in_one_piece_for_a_model_that_sees_little():
    mixture = talk(31.3).sum(0)
    whole = Bands(shuffled=False)(mixture[None])[0]
    found = Predictor(Bands(), RATE, SMALL).separate(mixture, RATE)
    best = [0, 1] if si_sdr(found[0], whole[0]) > 0 else [1, 0]
    torch.testing.assert_close(found[best], whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seconds", [8, 8.1, 15.5, 16, 61.7])
def test_spans_and_chunks_join_without_a_swap(tmp_path, seconds):
    sources = talk(seconds, seed=3)
    path = wav(tmp_path / "long.wav", sources.sum(0))
    whole = Bands(shuffled=False)(sources.sum(0)[None])[0]
    frame = Predictor(Bands(), RATE, SMALL).predict(path, sample_format="float")
    assert frame["doubtful_joins"].tolist() == [0, 0]
    assert frame["seconds"].tolist() == [pytest.approx(seconds)] * 2
    found = torch.from_numpy(np.stack(frame["audio"].tolist()))
    best = [0, 1] if si_sdr(found[0], sources[0]) > 0 else [1, 0]
    torch.testing.assert_close(found[best], whole, atol=1e-6, rtol=0)
    for start in range(0, len(sources[0]) - RATE, 2 * RATE):  # in every stretch
        for speaker in (0, 1):
            piece = slice(start, start + 2 * RATE)
            assert si_sdr(found[best][speaker, piece], sources[speaker, piece]) > 25


def test_a_model_that_gives_its_speakers_at_random_would_swap_without_alignment():
    """The stand-in is no easy one: laid side by side, its chunks change places."""
    mixture = talk(31.3).sum(0)
    first = [
        bool(Bands()(chunk[None])[0, 0].norm() > Bands()(chunk[None])[0, 1].norm())
        for chunk in mixture.split(RATE)
    ]
    assert 5 < sum(first) < 26


def test_mossformer_on_a_recording_of_one_chunk_is_the_model_itself(tiny, tmp_path):
    samples = talk(1.7)
    path = wav(tmp_path / "a.wav", samples.sum(0))
    frame = Predictor(tiny, RATE).predict(path, sample_format="float")
    with torch.inference_mode():
        wanted = tiny.eval()(samples.sum(0)[None])[0]
    torch.testing.assert_close(torch.from_numpy(np.stack(frame["audio"].tolist())), wanted, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Recordings of many lengths, one of several spans."""
    folder = tmp_path_factory.mktemp("recordings")
    for i, seconds in enumerate((1.2, 0.01, 19.3, 3.0, 1.3, 0.4, 2.0, 5.1)):
        wav(folder / f"{i}.wav", talk(seconds, seed=i).sum(0))
    return folder


def rows_of(predictor, source, batch_size):
    found = []
    for shard in predictor.shards(source, 256):
        for rows, bad, _ in core.run(predictor, predictor.read(shard), batch_size):
            assert not bad
            found += rows
    return found


@pytest.mark.parametrize("name", ["mossformer", "bands"])
def test_rows_of_a_batch_are_those_of_one_by_one(tiny, recordings, name):
    predictor = Predictor(tiny if name == "mossformer" else Bands(), RATE, SMALL)
    together, single = rows_of(predictor, recordings, 32), rows_of(predictor, recordings, 1)
    assert [(row["id"], row["span"]) for row in together] == [(row["id"], row["span"]) for row in single]
    assert len(together) == 7 + 3
    for a, b in zip(together, single, strict=True):
        one, other = (np.load(io.BytesIO(row["audio"].content)) for row in (a, b))
        assert one.shape == other.shape == (len(a["chunks"]), 2, min(a["samples"], 2 * RATE))
        assert a["chunks"] == b["chunks"]
        assert (a["chunks"][0], a["chunks"][-1]) == (a["start"], a["start"] + a["samples"] - one.shape[2])
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert a["energy"] == b["energy"]
        assert list(a) == list(predictor.columns)


def test_shards_hold_a_span_or_many_short_recordings(recordings):
    predictor = Predictor(Bands(), RATE, SMALL)
    shards = predictor.shards(recordings, 256)
    assert [[record.id for record in shard] for shard in shards] == [
        ["0.wav", "1.wav"],
        ["2.wav#0"],
        ["2.wav#1"],
        ["2.wav#2"],
        ["3.wav", "4.wav", "5.wav", "6.wav"],
        ["7.wav"],
    ]
    assert pickle.loads(pickle.dumps(shards)) == shards == predictor.shards(recordings, 256)
    assert max(map(len, predictor.shards(recordings, 1))) == 1


# ---------------------------------------------------------------- levels, files, tables


def test_levels_are_the_models_and_loud_ones_are_made_quieter_together(tmp_path):
    sources = talk(3) * torch.tensor([[9.0], [1.0]])
    path = wav(tmp_path / "loud.wav", sources.sum(0))
    predictor = Predictor(Bands(shuffled=False), RATE)
    for sample_format in ("pcm16", "float"):
        frame = predictor.predict(path, sample_format=sample_format)
        energy = sources.square().sum(1) / sources.sum(0).square().sum()
        assert frame["level_db"].tolist() == pytest.approx((10 * energy.log10()).tolist(), abs=0.02)
        gain = 10 ** (frame["gain_db"][0] / 20)
        assert frame["gain_db"][0] == frame["gain_db"][1]
        found = torch.from_numpy(np.stack(frame["audio"].tolist()))
        whole = Bands(shuffled=False)(sources.sum(0)[None])[0]
        assert whole.abs().max() > 3
        assert (gain < 0.4) if sample_format == "pcm16" else (gain == 1)
        torch.testing.assert_close(found, whole * gain, atol=2**-15, rtol=0)
        assert (found.abs().max() <= 1) == (sample_format == "pcm16")


def test_a_speaker_who_is_not_there_is_called_silent(tmp_path):
    wav(tmp_path / "alone.wav", talk(5, high=False).sum(0))
    wav(tmp_path / "both.wav", talk(5).sum(0))
    frame = Predictor(Bands(shuffled=False), RATE).predict(tmp_path)
    assert frame["silent"].tolist() == [False, True, False, False]
    assert frame["level_db"][0] == pytest.approx(0, abs=0.1)
    assert frame["level_db"][1] < -40
    assert Predictor(Bands(False), RATE).predict(tmp_path, silent_db=-80)["silent"].tolist() == [False] * 4


def test_files_and_table_of_a_folder(recordings, tmp_path):
    (recordings / "sub").mkdir(exist_ok=True)
    wav(recordings / "sub" / "ä b.wav", talk(1).sum(0))
    frame = Predictor(Bands(), RATE, SMALL).predict(recordings, tmp_path / "out")
    (recordings / "sub" / "ä b.wav").unlink()
    table = pq.read_table(tmp_path / "out" / "speakers.parquet")
    pd.testing.assert_frame_equal(table.to_pandas(), frame)
    assert [str(kind) for kind in table.schema.types] == [
        "string", "int32", "string", "double", "int32", "double", "bool", "double", "int32",
    ]  # fmt: skip
    assert len(frame) == 18
    assert frame["file"].tolist()[-2:] == ["sub/ä b.wav.speaker1.wav", "sub/ä b.wav.speaker2.wav"]
    for row in frame.to_dict("records"):
        info = soundfile.info(tmp_path / "out" / row["file"])
        assert (info.samplerate, info.channels, info.subtype, info.format) == (RATE, 1, "PCM_16", "WAV")
        assert info.frames / RATE == pytest.approx(row["seconds"])
    with pytest.raises(UsageError, match="is there already: choose another folder"):
        Predictor(Bands(), RATE).predict(recordings, tmp_path / "out")


def test_float_files_have_no_time_in_them_and_long_ones_are_rf64(recordings, tmp_path, monkeypatch):
    predictor = Predictor(Bands(), RATE, SMALL)
    predictor.predict(recordings / "0.wav", tmp_path / "a", sample_format="float")
    content = (tmp_path / "a" / "0.wav.speaker1.wav").read_bytes()
    at = content.index(b"PEAK")
    assert content[at + 12 : at + 16] == bytes(4)
    assert audio.inspect(tmp_path / "a" / "0.wav.speaker1.wav").frames == round(1.2 * RATE)
    monkeypatch.setattr(results, "LARGEST_WAV", 10_000)
    for sample_format in ("float", "pcm16"):
        out = tmp_path / sample_format
        predictor.predict(recordings / "0.wav", out, sample_format=sample_format)
        info = soundfile.info(out / "0.wav.speaker2.wav")
        assert (info.format, info.frames) == ("RF64", round(1.2 * RATE))
        samples = audio.read(out / "0.wav.speaker2.wav", RATE)
        torch.testing.assert_close(
            samples, audio.read(tmp_path / "a" / "0.wav.speaker2.wav", RATE), atol=2**-15, rtol=0
        )


def test_other_rates_channels_and_parts(tmp_path):
    low, high = talk(4)
    six = torch.stack([low, high, torch.zeros_like(low), low, high, low])
    up = audio_functional.resample(six, RATE, 96_000)
    wav(tmp_path / "six.wav", up, 96_000)
    predictor = Predictor(Bands(shuffled=False), RATE)
    frame = predictor.predict(tmp_path / "six.wav")
    assert frame["sample_rate"].tolist() == [RATE, RATE]
    assert frame["seconds"].tolist() == [4.0, 4.0]
    assert si_sdr(torch.from_numpy(frame["audio"][0]), low) > 25
    assert si_sdr(torch.from_numpy(frame["audio"][1]), high) > 25
    alone = predictor.predict(tmp_path / "six.wav", channel="3")
    assert alone["silent"].tolist() == [False, True]
    with pytest.raises(DataError, match=r"record 'six.wav': no channel 6: it has 6"):
        predictor.predict(tmp_path / "six.wav", channel="6")
    manifest = pd.DataFrame({"audio": [str(tmp_path / "six.wav")], "start": [1.0], "end": [2.5], "id": ["x"]})
    part = predictor.predict(manifest)
    assert part["seconds"].tolist() == [1.5, 1.5]
    assert si_sdr(torch.from_numpy(part["audio"][0]), low[RATE : 5 * RATE // 2]) > 25
    direct = predictor.separate(up, 96_000)
    torch.testing.assert_close(direct[0], torch.from_numpy(frame["audio"][0]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- faults


def bad_files(folder):
    """One file of each bad kind, and what is said of it."""
    sound = talk(3).sum(0)
    broken = sound.clone()
    broken[12_000] = math.nan
    wav(folder / "nan.wav", broken)
    whole = wav(folder / "whole.wav", sound)
    (folder / "cut.wav").write_bytes(whole.read_bytes()[:20_000])
    whole.unlink()
    (folder / "text.wav").write_text("I am a text file\n" * 99)
    (folder / "empty.wav").write_bytes(b"")
    wav(folder / "none.wav", sound[:0])
    (folder / "call.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    return {
        "nan.wav": "NaN or infinite samples, the first at 1.500 s",
        "cut.wav": "truncated: ",
        "text.wav": "not audio that can be read",
        "empty.wav": "an empty file",
        "none.wav": "it has no samples",
        "call.m4a": "not audio that can be read",
    }


def test_every_fault_has_its_reason_and_the_others_go_on(tmp_path):
    reasons = bad_files(tmp_path)
    wav(tmp_path / "good.wav", talk(1).sum(0))
    predictor = Predictor(Bands(), RATE, SMALL)
    rows, bad = [], {}
    for shard in predictor.shards(tmp_path, 256):
        for good, faults, _ in core.run(predictor, predictor.read(shard), 32):
            rows += good
            bad |= {fault.id: fault.reason for fault in faults}
    assert [row["id"] for row in rows] == ["good.wav"]
    assert bad.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert bad[name].startswith(reason)
    with pytest.raises(DataError, match=r"record 'call\.m4a': not audio"):
        predictor.predict(tmp_path)


def test_zero_length_parts_and_files_that_are_gone(tmp_path):
    wav(tmp_path / "a.wav", talk(1).sum(0))
    lines = [{"audio": "a.wav", "start": 0.5, "end": 0.5}, {"audio": "b.wav"}, {"audio": "a.wav", "start": 3}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    predictor = Predictor(Bands(), RATE)
    (shard,) = predictor.shards(tmp_path / "m.jsonl", 8)
    _, bad, _ = next(core.run(predictor, predictor.read(shard), 8))
    assert [fault.reason for fault in bad] == [
        "a part from 0.5 s to 0.5 s has no samples",
        "no such file",
        "a part from 3 s to 1 s has no samples",
    ]
    assert list(predictor.named_files(tmp_path / "m.jsonl")) == [
        str(tmp_path / "a.wav"),
        str(tmp_path / "b.wav"),
    ]


def test_a_recording_with_a_bad_span_is_left_out_whole(tmp_path):
    sound = talk(20).sum(0)
    sound[10 * RATE] = math.inf
    wav(tmp_path / "a.wav", sound)
    wav(tmp_path / "b.wav", talk(2).sum(0))
    predictor = Predictor(Bands(), RATE, SMALL)
    rows, bad = [], []
    for shard in predictor.shards(tmp_path, 256):
        for good, faults, _ in core.run(predictor, predictor.read(shard), 32):
            rows += good
            bad += faults
    assert [(fault.id, fault.reason) for fault in bad] == [
        (
            "a.wav#1",
            "NaN or infinite samples, the first at 10.000 s; so the whole recording has no result",
        )
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.npy").write_bytes(row["audio"].content)
        row["audio"] = f"{number}.npy"
    (tmp_path / "results").mkdir()
    predictor.finish(iter(rows), tmp_path, tmp_path / "results")
    table = pq.read_table(tmp_path / "results" / "speakers.parquet").to_pylist()
    assert [row["id"] for row in table] == ["b.wav", "b.wav"]
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        "b.wav.speaker1.wav",
        "b.wav.speaker2.wav",
        "speakers.parquet",
    ]


@pytest.mark.parametrize("name", ["mossformer", "mossformer2"])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17])
def test_silence_and_a_few_samples_give_as_many(name, count, tiny, tmp_path):
    model = tiny if name == "mossformer" else create_model("mossformer2", num_spks=2, dim=16, depth=1)
    wav(tmp_path / "few.wav", talk(1).sum(0)[:count])
    wav(tmp_path / "silence.wav", torch.zeros(5 * RATE))
    frame = Predictor(model, RATE).predict(tmp_path)
    assert [len(samples) for samples in frame["audio"]] == [count, count, 5 * RATE, 5 * RATE]
    assert all(np.isfinite(samples).all() for samples in frame["audio"])
    assert frame["silent"].tolist()[2:] == [True, True]
    assert frame["level_db"].isna().tolist()[2:] == [True, True]
    assert all((samples == 0).all() for samples in frame["audio"][2:])


def test_samples_in_memory(tiny):
    predictor = Predictor(tiny, RATE)
    assert predictor.separate(torch.zeros(2, 4410), 44_100).shape == (2, 800)
    for samples, reason in (
        (torch.zeros(0), "it has no samples"),
        (torch.tensor([0.0, math.nan]), "NaN or infinite samples"),
    ):
        with pytest.raises(BadRecord, match=reason):
            predictor.separate(samples, RATE)
    with pytest.raises(BadRecord, match="no channel 2: it has 2"):
        Predictor(tiny, RATE, Options(channel="2")).separate(torch.zeros(2, 100), RATE)


def test_a_broken_model_is_an_error_of_the_job_not_of_the_recording(tmp_path, tiny):
    model = create_model("mossformer", **TINY)
    with torch.no_grad():
        model.decoder.weight.fill_(math.nan)
    wav(tmp_path / "a.wav", talk(1).sum(0))
    with pytest.raises(DataError, match="the model gives NaN or infinite samples"):
        Predictor(model, RATE).predict(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_seconds": 13}, "--overlap-seconds 13: it takes 1 to half of the chunk's 24 s"),
        ({"overlap_seconds": 0}, "--overlap-seconds 0: it takes"),
        ({"span_seconds": 47}, "--span-seconds 47: it takes two chunks or more"),
        ({"channel": "left"}, "channel 'left': it must be mix, or a number"),
        ({"sample_format": "pcm"}, r"--sample-format pcm: it takes pcm16, float; did you mean 'pcm16'\?"),
        ({"top_k": 3}, "--top-k is no option of this model"),
    ],
)
def test_settings_that_are_refused(tiny, settings, message):
    with pytest.raises(UsageError, match=message):
        core.configure(Predictor(tiny, RATE), settings)


def test_from_a_model_folder(tiny, tmp_path):
    about = {"domain": "speech", "name": "mossformer", "arguments": TINY}
    hub.save(tmp_path / "model", tiny, **about, preprocessing={"sample_rate": RATE})
    predictor = manyheads.load(tmp_path / "model")
    assert isinstance(predictor, Predictor)
    assert predictor.sample_rate == RATE
    assert predictor.settings == {
        "chunk_seconds": 24,
        "overlap_seconds": 8,
        "span_seconds": 120,
        "channel": "mix",
        "sample_format": "pcm16",
        "silent_db": -40,
    }
    assert core.configure(predictor, {"chunk_seconds": 30}).settings["chunk_seconds"] == 30
    hub.save(tmp_path / "other", tiny, **about, preprocessing={})
    with pytest.raises(DataError, match="sample_rate = None"):
        manyheads.load(tmp_path / "other")
