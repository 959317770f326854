"""Batch jobs that separate speakers, through the command line; the proof on sixty minutes is slow.

`pytest -m slow tests/apps/test_jobs_separation.py -s` prints the proof's figures. With MANYHEADS_SEPARATOR, a
model folder, it runs that model over mixtures of two speakers it has not heard as well.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torchaudio.functional as audio_functional

from manyheads.apps import cli
from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.speech import audio

SCRIPT = Path(__file__).parents[1] / "speech" / "bands.py"
COMMAND = """
import sys
from manyheads.apps.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
sys.exit(code)
"""
PAIRS = [
    (0, 5),
    (4, 9),
    (3, 8),
    (2, 7),
]  # of the test's speakers; weights of the alignment were chosen on others
SPEAKERS = Path(os.environ.get("MANYHEADS_DATA", "").split(os.pathsep)[0]) / "speech" / "librispeech_speakers"
MODEL = os.environ.get("MANYHEADS_SEPARATOR")
TINY = {"num_spks": 2, "dim": 16, "depth": 1, "query_key_dim": 16}
RATE = 8000
WIDE = ((0, 4000), (0, 4000))  # all of both speakers
LONG = ["--chunk-seconds", 120, "--overlap-seconds", 10, "--span-seconds", 360]
SMALL = ["--chunk-seconds", 2, "--overlap-seconds", 1, "--span-seconds", 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("separation") / "model"
    about = {"domain": "speech", "name": "mossformer", "arguments": TINY}
    hub.save(folder, create_model("mossformer", **TINY), **about, preprocessing={"sample_rate": RATE})
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A recording of four spans, short ones, and two that are none."""
    folder = tmp_path_factory.mktemp("separation") / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, seconds in (("long.flac", 20), ("a.wav", 1.5), ("b.wav", 0.7)):
        soundfile.write(folder / name, rng.normal(size=round(16_000 * seconds)) / 10, 16_000)
    (folder / "text.wav").write_text("no sound")
    (folder / "cut.flac").write_bytes((folder / "long.flac").read_bytes()[:100_000])
    return folder


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def test_files_a_speaker_and_reasons(model, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, recordings, "-o", out, *SMALL) == 3
    assert "2 of 8 records are bad" in capsys.readouterr().err
    assert not (out / "results").exists()
    assert predict(model, recordings, "-o", out, *SMALL, "--resume", "--max-bad", 0.3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 6
    assert [file.name for file in out.iterdir() if file.name.startswith(("files-", "."))] == []
    table = pq.read_table(out / "results" / "speakers.parquet").to_pylist()
    assert [(row["id"], row["speaker"]) for row in table] == [
        (name, speaker) for name in ("a.wav", "b.wav", "long.flac") for speaker in (1, 2)
    ]
    for row in table:
        assert soundfile.info(out / "results" / row["file"]).frames == round(row["seconds"] * RATE)
    bad = [json.loads(line) for file in sorted(out.glob("bad-*")) for line in file.read_text().splitlines()]
    assert {each["id"]: each["reason"].split(":")[0].split(" (")[0] for each in bad} == {
        "cut.flac": "truncated",
        "text.wav": "not audio that can be read",
    }
    job = json.loads((out / "job.json").read_text())
    assert (job["options"]["overlap_seconds"], job["options"]["channel"]) == (1, "mix")
    success = json.loads((out / "_SUCCESS").read_text())
    assert "results/long.flac.speaker2.wav" in success["files"]


def test_results_made_again_have_the_same_bytes(model, recordings, tmp_path, inspect_folder):
    out, options = tmp_path / "out", [*SMALL, "--max-bad", 0.3, "--quiet", "--sample-format", "float"]
    assert predict(model, recordings, "-o", out, *options) == 0
    before = inspect_folder.digests(out)
    (out / "results" / "long.flac.speaker1.wav").unlink()
    time.sleep(1.1)  # a float WAV notes the second it was written in, if it may
    assert predict(model, recordings, "-o", out, *options, "--resume") == 0
    assert inspect_folder.digests(out) == before


def test_workers_and_options_that_are_refused(model, recordings, tmp_path, capsys):
    options = [*SMALL, "--max-bad", 0.3, "--quiet"]
    assert predict(model, recordings, "-o", tmp_path / "one", *options) == 0
    assert predict(model, recordings, "-o", tmp_path / "two", *options, "--workers", 1) == 0
    for file in sorted((tmp_path / "one" / "results").glob("*.wav")):
        one, two = (audio.read(tmp_path / name / "results" / file.name, RATE) for name in ("one", "two"))
        torch.testing.assert_close(one, two, atol=2**-14, rtol=0)
    assert predict(model, recordings, "-o", tmp_path / "x", "--overlap-seconds", 13) == 2
    assert "--overlap-seconds 13: it takes 1 to half of the chunk's 24 s" in capsys.readouterr().err
    assert predict(model, recordings, "-o", tmp_path / "x", "--channel", "left") == 2
    assert "channel 'left': it must be mix, or a number" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- the proof


def clips(split):
    """The clips of each speaker of a part of the shared data, at the model's rate."""
    with (SPEAKERS / "metadata.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["file"].startswith(split)]
    return {
        speaker: [audio.read(SPEAKERS / row["file"], RATE) for row in found if row["speaker"] == speaker]
        for speaker in sorted({row["speaker"] for row in found})
    }


def banded(speech, low, high):
    spectrum = torch.fft.rfft(speech)
    frequency = torch.linspace(0, RATE / 2, len(spectrum))
    return torch.fft.irfft(spectrum.masked_fill((frequency < low) | (frequency > high), 0), len(speech))


def write_mixture(folder, minutes, bands, pair=PAIRS[0]):
    """Two speakers talking for so long, each clip after the other in an order of its own; 16 kHz FLAC.

    Args:
        folder: Where it goes.
        minutes: Its length.
        bands: What is left of each speaker, in Hz.
        pair: The speakers' numbers.

    Returns:
        The mixture's file, and the sources `[2, L]` at the model's rate.
    """
    known = list(clips("test-other").values())
    rng = np.random.default_rng(0)
    sources = []
    for own, (low, high) in zip((known[n] for n in pair), bands, strict=True):
        joined, length = [], 0
        while length < minutes * 60 * RATE:
            for clip in (own[i] for i in rng.permutation(len(own))):
                voice = banded(clip, low, high)
                joined.append(voice * 0.05 / voice.square().mean().sqrt())
                length += len(clip)
        sources.append(torch.cat(joined)[: minutes * 60 * RATE])
    both = torch.stack(sources)
    path = folder / "mix.flac"
    with soundfile.SoundFile(path, "w", 2 * RATE, 1, "PCM_16", format="FLAC") as file:
        for piece in both.sum(0).split(60 * RATE):
            file.write(audio_functional.resample(piece, RATE, 2 * RATE).clamp(-1, 1).numpy())
    return path, both


def start(command, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    whole = [sys.executable, *command, "predict", *map(str, arguments)]
    return subprocess.Popen(whole, text=True, env=environment, **pipes)


def finish(process):
    """Wait for a run; its peak memory in MiB and its last line."""
    out, err = process.communicate(timeout=5000)
    assert process.returncode == 0, err
    return float(out), err.strip().splitlines()[-1]


def kill_when(process, condition):
    """Kill a run as soon as something is there."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def si_sdr(found, source):
    scale = (found @ source) / source.square().sum()
    return 10 * math.log10((scale * source).square().sum() / (found - scale * source).square().sum())


def measure(out, sources):
    """Which source each speaker is, by the whole; and by how much they fit it better, every five seconds."""
    found = torch.stack([audio.read(out / "results" / f"mix.flac.speaker{n}.wav", RATE) for n in (1, 2)])
    assert found.shape == sources.shape
    mixture = sources.sum(0)
    turned = sum(si_sdr(found[i], sources[i]) for i in (0, 1)) < sum(
        si_sdr(found[i], sources[1 - i]) for i in (0, 1)
    )
    found = found.flip(0) if turned else found
    gains = [si_sdr(found[i], sources[i]) - si_sdr(mixture, sources[i]) for i in (0, 1)]
    own, other, step = [], [], 5 * RATE
    for begin in range(0, found.shape[1] - step + 1, step):
        piece = slice(begin, begin + step)
        a, b = found[:, piece], sources[:, piece]
        own.append(float((a - b).square().sum()))
        other.append(float((a - b.flip(0)).square().sum()))
    swapped = sum(a >= b for a, b in zip(own, other, strict=True))
    return gains, swapped, len(own)


def prove(tmp_path, inspect_folder, command, model, bands, minutes):
    """Flat memory, and the same bytes after two kills: one among the spans, one while they are joined."""
    (tmp_path / "short").mkdir()
    short, _ = write_mixture(tmp_path / "short", 6, bands)
    path, sources = write_mixture(tmp_path, minutes, bands)
    few, line = finish(start(command, model, short, "-o", tmp_path / "few"))
    print(f"\n6 minutes: {few:.0f} MiB; {line}")
    peak, line = finish(start(command, model, path, "-o", tmp_path / "undisturbed"))
    print(f"{minutes} minutes ({path.stat().st_size / 1e6:.0f} MB): {peak:.0f} MiB; {line}")
    killed = tmp_path / "killed"
    kill_when(start(command, model, path, "-o", killed), lambda: len(list(killed.glob("part-*"))) > 5)
    kill_when(
        start(command, model, path, "-o", killed, "--resume"),
        lambda: list(killed.glob(".tmp-*-results/*speaker1.wav")),
    )
    assert not (killed / "_SUCCESS").exists()
    parts = len(list(killed.glob("part-*")))
    _, line = finish(start(command, model, path, "-o", killed, "--resume"))
    print(f"killed twice, the second time with {parts} parts: {line}")
    assert inspect_folder.digests(killed) == inspect_folder.digests(tmp_path / "undisturbed")
    assert peak <= 1.15 * few
    row = pq.read_table(killed / "results" / "speakers.parquet").to_pylist()[0]
    gains, swapped, stretches = measure(killed, sources)
    print(
        f"improvement {gains[0]:.1f} and {gains[1]:.1f} dB; {swapped} of {stretches} stretches swapped;"
        f" {row['doubtful_joins']} doubtful joins"
    )
    return gains, swapped


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not SPEAKERS.is_dir(), reason="needs the LibriSpeech speakers in MANYHEADS_DATA")
def test_sixty_minutes_of_a_stand_in_with_speakers_in_any_order(tmp_path, inspect_folder):
    bands = ((0, 1500), (2100, 3000))
    gains, swapped = prove(tmp_path, inspect_folder, [str(SCRIPT)], "bands", bands, 60)
    assert swapped == 0
    assert min(gains) > 15


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not SPEAKERS.is_dir(), reason="needs the LibriSpeech speakers in MANYHEADS_DATA")
@pytest.mark.skipif(MODEL is None, reason="needs a trained separator's folder in MANYHEADS_SEPARATOR")
def test_sixty_minutes_of_a_trained_model(tmp_path, inspect_folder):
    """No stretch is swapped, of two speakers whom a model of 3 dB tells apart."""
    gains, swapped = prove(tmp_path, inspect_folder, ["-c", COMMAND], MODEL, WIDE, 60)
    assert swapped == 0
    assert min(gains) > 3


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not SPEAKERS.is_dir(), reason="needs the LibriSpeech speakers in MANYHEADS_DATA")
@pytest.mark.skipif(MODEL is None, reason="needs a trained separator's folder in MANYHEADS_SEPARATOR")
@pytest.mark.parametrize("pair", PAIRS[1:])
def test_chunks_swap_no_more_than_long_pieces(tmp_path, pair):
    """Swaps are the model's own, in chunks: over two minutes at once it has as many; joining adds none."""
    path, sources = write_mixture(tmp_path, 60, WIDE, pair)
    found = {}
    for name, options in (("chunks", []), ("long", LONG)):
        _, line = finish(start(["-c", COMMAND], MODEL, path, "-o", tmp_path / name, *options))
        gains, swapped, stretches = found[name] = measure(tmp_path / name, sources)
        print(
            f"\n{pair}, {name}: {swapped} of {stretches} swapped, {gains[0]:.1f} and {gains[1]:.1f} dB", line
        )
    assert found["chunks"][1] <= found["long"][1] + stretches // 100
    assert min(found["chunks"][0]) >= min(found["long"][0]) - 0.3
