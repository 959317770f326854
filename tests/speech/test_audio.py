"""Sound files: pieces equal the whole in every format, rates and channels, and what is refused."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional as audio_functional

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.speech import audio
from manyheads.speech.audio import AudioInfo, Recording

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "aiff": ("AIFF", "PCM_24"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
RATE = 16_000
SHARED = Path(os.environ.get("MANYHEADS_DATA", "nowhere").split(os.pathsep)[0]) / "speech"
SPEAKERS = SHARED / "librispeech_speakers"


def voice(seconds, rate=RATE, channels=1, seed=0):
    """Noise whose loudness changes, as speech's does: lossy decoders must not come out of it changed."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    time = np.arange(count) / rate
    loud = 0.2 * np.abs(np.sin(2 * math.pi * 1.7 * time)) ** 3
    tone = np.sin(2 * math.pi * (150 + 40 * np.sin(time)) * time)
    return (loud[:, None] * (tone[:, None] + rng.normal(size=(count, channels)) / 3)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same twelve seconds in each format."""
    folder = tmp_path_factory.mktemp("audio")
    samples = voice(12.3)
    found = {}
    for suffix, (kind, subtype) in FORMATS.items():
        found[suffix] = folder / f"voice.{suffix}"
        soundfile.write(found[suffix], samples, RATE, format=kind, subtype=subtype)
    return found


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rate", [16_000, 8000, 44_100])
def test_any_piece_equals_the_same_piece_of_the_whole(files, suffix, rate, monkeypatch):
    whole = audio.read(files[suffix], rate)
    assert whole.dtype == torch.float32
    assert len(whole) == audio.inspect(files[suffix]).length(rate) == math.ceil(12.3 * rate)
    monkeypatch.setattr(audio, "BLOCK", 3001)
    monkeypatch.setattr(audio, "RESAMPLED", 10_007)
    monkeypatch.setattr(audio, "HELD", 4099)
    for start, stop in ((0, 1), (1, 700), (33_333, 60_001), (7 * rate + 5, 9 * rate), (len(whole) - 3, None)):
        piece = audio.read(files[suffix], rate, start=start, stop=stop)
        torch.testing.assert_close(piece, whole[start:stop], atol=1e-6, rtol=0)
    for size in (999, 40_000):
        pieces = list(audio.blocks(files[suffix], rate, size))
        assert {len(piece) for piece in pieces[:-1]} == {size}
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_resampling_it_is_what_soundfile_decodes_at_once(files, suffix):
    decoded, rate = soundfile.read(files[suffix], dtype="float32")
    assert rate == RATE
    whole = audio.read(files[suffix], RATE)
    torch.testing.assert_close(whole, torch.from_numpy(decoded), atol=1e-7, rtol=0)
    with Recording(files[suffix]) as recording:  # back and forth in one open file
        for start in (90_000, 50, 120_000, 119_000, 60_000):
            assert torch.equal(recording.read(start, start + 5000), whole[start : start + 5000])


def test_resampling_is_torchaudios(files):
    samples = torch.from_numpy(soundfile.read(files["wav"], dtype="float32")[0])
    for rate in (8000, 11_025, 22_050, 48_000):
        wanted = audio_functional.resample(samples, RATE, rate)
        torch.testing.assert_close(audio.read(files["wav"], rate), wanted, atol=1e-5, rtol=0)


def test_content_in_memory_reads_as_the_file_does(files):
    for path in files.values():
        content = path.read_bytes()
        assert audio.inspect(content) == audio.inspect(path) == AudioInfo(round(12.3 * RATE), RATE, 1)
        assert torch.equal(
            audio.read(content, 8000, start=9, stop=5000), audio.read(path, 8000, start=9, stop=5000)
        )


def test_six_channels_at_96_khz(tmp_path):
    samples = voice(1.5, 96_000, 6)
    soundfile.write(tmp_path / "six.wav", samples, 96_000, subtype="FLOAT")
    path = tmp_path / "six.wav"
    assert audio.inspect(path) == AudioInfo(144_000, 96_000, 6)
    assert audio.inspect(path).seconds == 1.5
    mixed = torch.from_numpy(samples.mean(axis=1))
    torch.testing.assert_close(audio.read(path, 96_000), mixed)
    torch.testing.assert_close(audio.read(path, 96_000, "4"), torch.from_numpy(samples[:, 4].copy()))
    wanted = audio_functional.resample(mixed, 96_000, 8000)
    torch.testing.assert_close(audio.read(path, 8000), wanted, atol=1e-5, rtol=0)
    with pytest.raises(BadRecord, match="no channel 6: it has 6"):
        audio.read(path, 8000, "6")
    for channel in ("left", "-1", "1.0", ""):
        with pytest.raises(UsageError, match="it must be mix, or a number counted from 0"):
            audio.read(path, 8000, channel)


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_very_short_ones(tmp_path, count, rate):
    soundfile.write(tmp_path / "short.wav", voice(1)[:count], RATE)
    found = audio.read(tmp_path / "short.wav", rate)
    assert len(found) == math.ceil(count * rate / RATE)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_truncated_file_is_refused_before_it_is_read(files, suffix, share, tmp_path):
    content = files[suffix].read_bytes()
    cut = content[: int(len(content) * share) + 1]
    (tmp_path / "cut").write_bytes(cut)
    for source in (tmp_path / "cut", cut):
        with pytest.raises(BadRecord, match="truncated"):
            audio.inspect(source)


def test_damage_in_the_middle_says_where(files, tmp_path):
    content = bytearray(files["flac"].read_bytes())
    half = len(content) // 2
    content[half : half + 3000] = bytes(3000)
    assert audio.read(bytes(content), RATE, stop=1000).shape == (1000,)
    with pytest.raises(BadRecord, match=r"truncated or damaged behind [4-6]\.\d+ s of 12.300 s"):
        audio.read(bytes(content), RATE)


def test_a_wav_written_to_a_pipe_has_no_length_and_is_whole(files):
    content = bytearray(files["wav"].read_bytes())
    struct.pack_into("<I", content, 4, 0xFFFFFFFF)
    struct.pack_into("<I", content, content.index(b"data") + 4, 0xFFFFFFFF)
    assert torch.equal(audio.read(bytes(content), RATE), audio.read(files["wav"], RATE))


def test_a_flac_written_to_a_pipe_is_refused_with_the_reason(files):
    content = bytearray(files["flac"].read_bytes())
    content[21] &= 0xF0  # the 36 bits of the number of samples
    content[22:26] = bytes(4)
    with pytest.raises(BadRecord, match="its header does not say how long it is"):
        audio.inspect(bytes(content))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.raw", "a.txt"])
def test_what_is_no_audio(tmp_path, name):
    path = tmp_path / name
    path.write_text("I am a text file\n" * 500)
    for source in (path, path.read_bytes()):
        with pytest.raises(BadRecord, match="not audio that can be read"):
            audio.inspect(source)
    path.write_bytes(b"")
    for source in (path, b""):
        with pytest.raises(BadRecord, match="an empty file"):
            audio.inspect(source)
    path.unlink()
    with pytest.raises(BadRecord, match="no such file"):
        audio.inspect(path)
    with pytest.raises(BadRecord, match="not a file"):
        audio.inspect(tmp_path)


def test_a_header_without_samples(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(BadRecord, match="it has no samples"):
        audio.inspect(tmp_path / "none.wav")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    samples = voice(2, channels=2)
    samples[16_000, 1] = value
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    path = tmp_path / "bad.wav"
    for rate in (RATE, 8000):
        with pytest.raises(BadRecord, match=r"NaN or infinite samples, the first at 1\.000 s"):
            audio.read(path, rate)
        assert len(audio.read(path, rate, "0")) == 2 * rate
        assert len(audio.read(path, rate, stop=rate // 2)) == rate // 2


def test_rates_without_a_common_step_are_refused_not_tried(tmp_path):
    soundfile.write(tmp_path / "odd.wav", voice(0.1), 15_991)
    with pytest.raises(BadRecord, match="15991 Hz cannot be turned into 8000 Hz exactly"):
        audio.read(tmp_path / "odd.wav", 8000)
    assert len(audio.read(tmp_path / "odd.wav", 15_991)) == 1600


def test_write(tmp_path):
    samples = torch.from_numpy(voice(0.5, channels=2).T.copy())
    for name, subtype, tolerance in (
        ("a.wav", None, 2**-15),
        ("a.flac", None, 2**-15),
        ("b.wav", "FLOAT", 0),
    ):
        audio.write(tmp_path / name, samples, 8000, subtype)
        found, rate = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)
        assert rate == 8000
        torch.testing.assert_close(torch.from_numpy(found.T.copy()), samples, atol=tolerance, rtol=0)
    audio.write(tmp_path / "mono.wav", samples[0], 8000)
    assert audio.inspect(tmp_path / "mono.wav") == AudioInfo(samples.shape[1], 8000, 1)
    with pytest.raises(DataError, match=r"samples reach 1\.5 and would be clipped at 1"):
        audio.write(tmp_path / "loud.wav", torch.tensor([0.0, -1.5]), 8000)
    audio.write(tmp_path / "loud.wav", torch.tensor([0.0, -1.5]), 8000, "FLOAT")
    assert audio.read(tmp_path / "loud.wav", 8000).tolist() == [0.0, -1.5]
    with pytest.raises(DataError, match="NaN or infinite samples cannot be written"):
        audio.write(tmp_path / "nan.wav", torch.tensor([math.nan]), 8000, "FLOAT")


@pytest.mark.skipif(not SPEAKERS.is_dir(), reason="needs the LibriSpeech speakers in MANYHEADS_DATA")
def test_real_speech_of_the_shared_data():
    path = sorted((SPEAKERS / "test-other").glob("*.flac"))[0]
    assert audio.inspect(path) == AudioInfo(240_000, 16_000, 1)
    whole = audio.read(path, 8000)
    assert len(whole) == 120_000
    assert 0.01 < whole.square().mean().sqrt() < 0.3
    torch.testing.assert_close(
        audio.read(path.read_bytes(), 8000, start=60_000), whole[60_000:], atol=1e-6, rtol=0
    )
