"""Batch jobs of recognition by the command line: subtitles, bad recordings, resuming; the proof is slow.

`pytest -m slow tests/apps/test_jobs_recognition.py -s` prints the proof's figures. With a recogniser of
digits in MANYHEADS_DIGITS, a model folder, it prints the error rate, too; without it, weights are random.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from manyheads.apps import cli
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.speech import audio
from manyheads.speech.recognition import reading
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.vocabulary import FIRST, Characters

RATE = 8000
COMMAND = """
import sys
from manyheads.apps.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)  # MiB; ru_maxrss would count the parent's memory at the fork
sys.exit(code)
"""
FSDD = Path(os.environ.get("MANYHEADS_DATA", "")) / "speech" / "fsdd"
TIMES = re.compile(r"(\d+):(\d\d):(\d\d),(\d{3}) --> (\d+):(\d\d):(\d\d),(\d{3})")


def save(folder):
    """A model folder with random weights, so large that different sounds give different text."""
    torch.manual_seed(1)
    names = (*FIRST, *"0123456789")
    arguments = {
        "vocab_size": len(names), "input_size": 140, "dim": 32, "heads": 2, "units": 64,
        "encoder_blocks": 2, "decoder_blocks": 2,
    }  # fmt: skip
    model = create_model("paraformer", **arguments)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=3 * weight[0].numel() ** -0.5)
    cmvn = torch.tensor([[-15.0], [0.3]]).expand(2, 140)
    preprocessing = Preprocessing.of(RATE, Features(mels=20), cmvn, Characters(names)).to_json()
    hub.save(
        folder, model, domain="speech", name="paraformer", arguments=arguments, preprocessing=preprocessing
    )
    return folder


def noise(seconds, seed=0, pauses=()):
    samples = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed)) * 0.1
    for start, stop in pauses:
        samples[int(start * RATE) : int(stop * RATE)] = 0
    return samples.clamp(-0.99, 0.99)


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def read(output):
    return pd.concat([pd.read_parquet(part) for part in sorted(output.glob("part-*"))], ignore_index=True)


def cues(path):
    """Read an SRT file: start, end and text of each cue."""
    found = []
    for number, block in enumerate(path.read_text().split("\n\n")[:-1], 1):
        head, times, *lines = block.split("\n")
        assert head == str(number) and lines
        h1, m1, s1, a, h2, m2, s2, b = map(int, TIMES.fullmatch(times).groups())
        start, end = (
            (h * 60 + m) * 60_000 + s * 1000 + ms for h, m, s, ms in ((h1, m1, s1, a), (h2, m2, s2, b))
        )
        found.append((start, end, " ".join(lines)))
    return found


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of 6 s instead of ten minutes."""
    monkeypatch.setattr(reading, "PART_S", 6)
    monkeypatch.setattr(reading, "SEARCH_S", 1)
    monkeypatch.setattr("manyheads.speech.recognition.predictor.SHARD_S", 9)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "in"
    (folder / "calls").mkdir(parents=True)
    audio.write(
        folder / "long.flac", noise(30, 1, [(2, 3), (6.2, 6.9), (11, 13), (19, 20), (25, 25.5)]), RATE
    )
    audio.write(folder / "calls/one.wav", noise(3, 2), RATE)
    audio.write(folder / "calls/two.wav", noise(2, 3, [(0, 0.5)]), RATE)
    audio.write(folder / "quiet.wav", noise(2, 4) * 0, RATE)
    (folder / "text.mp3").write_text("no sound " * 500)
    return folder


def test_a_folder_with_subtitles(recordings, tmp_path, short_parts, capsys):
    model, out = save(tmp_path / "model"), tmp_path / "out"
    arguments = (model, recordings, "-o", out, "--vad", "energy", "--subtitles", "both", "--quiet")
    assert predict(*arguments) == 3  # one recording is text
    assert "1 of" in capsys.readouterr().err and not (out / "results").exists()
    assert predict(*arguments, "--resume", "--max-bad", 0.2) == 0
    rows = read(out)
    assert rows.id.drop_duplicates().tolist() == ["calls/one.wav", "calls/two.wav", "long.flac", "quiet.wav"]
    (bad,) = [json.loads(line) for file in out.glob("bad-*") for line in file.read_text().splitlines()]
    assert bad["id"] == "text.mp3" and bad["reason"].startswith("not audio")
    results = sorted(str(path.relative_to(out / "results")) for path in (out / "results").rglob("*.*"))
    wanted = [f"{id}.{end}" for id in rows.id.drop_duplicates() for end in ("srt", "vtt")]
    assert results == sorted(wanted)
    assert (out / "results/quiet.wav.srt").read_text() == ""
    assert (out / "results/quiet.wav.vtt").read_text() == "WEBVTT\n\n"
    for id, said in rows.groupby("id"):
        found = cues(out / "results" / f"{id}.srt")
        assert "".join(text for _, _, text in found).split() == "".join(said.text).split()
        assert all(a[1] <= b[0] for a, b in pairwise(found)) and all(start < end for start, end, _ in found)
        assert all(
            any(row.start_ms <= start and end <= row.end_ms + 1 for row in said.itertuples())
            for start, end, _ in found
        )
    job = json.loads((out / "job.json").read_text())
    assert job["options"]["vad"] == "energy" and job["options"]["subtitles"] == "both"
    assert set(rows[rows.id == "long.flac"].part) == {0, 1, 2, 3, 4}


def test_without_subtitles_and_with_slips(recordings, tmp_path, capsys):
    model, out = save(tmp_path / "model"), tmp_path / "out"
    (recordings / "text.mp3").unlink()
    assert predict(model, recordings, "-o", out, "--vad", "none", "--quiet") == 0
    assert not (out / "results").exists() and read(out).id.nunique() == 4
    for arguments, message in (
        (("--vad", "energi"), "--vad energi: it takes silero, energy, none; did you mean 'energy'?"),
        (("--subtitles", "ass"), "--subtitles ass: it takes none, srt, vtt, both"),
        (("--top-k", "3"), "--top-k is no option of this model (it has: --vad, --channel,"),
        (("--segment-seconds", "0"), "--segment-seconds takes 1 to 600, not 0"),
    ):
        assert predict(model, recordings, "-o", tmp_path / "no", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert predict(model, recordings, "-o", out, "--vad", "energy", "--resume") == 2
    assert "vad none -> energy" in capsys.readouterr().err


def test_silero_missing_stops_the_job_before_it_begins(recordings, tmp_path, capsys, monkeypatch):
    model = save(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert predict(model, recordings, "-o", tmp_path / "out") == 2
    assert "install manyheads[speech], or choose vad energy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for the end of the process."""


def test_stopped_anywhere_gives_the_same_bytes(recordings, tmp_path, short_parts, inspect_folder):
    model = save(tmp_path / "model")
    settings = {"vad": "energy", "subtitles": "srt"}

    def options(output, resume=False):
        return JobOptions(
            str(model), [str(recordings)], output, resume=resume, max_bad=0.5, quiet=True, settings=settings
        )

    run_job(options(tmp_path / "whole"))
    wanted = inspect_folder.digests(tmp_path / "whole")
    assert sum(name.startswith("part-") for name in wanted) >= 5
    for point, index in (("written", 2), ("part", 3), ("finished", None), ("success", None)):
        out = tmp_path / f"{point}-{index}"

        def fault(name, number, point=point, index=index):
            if name == point and index in (None, number):
                raise Killed

        with pytest.raises(Killed):
            run_job(options(out), fault=fault)
        done = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
        run_job(options(out, resume=True))
        assert inspect_folder.digests(out) == wanted
        assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in done.items())  # not made again
        assert len(done) == {2: 2, 3: 4}.get(index, len(list(out.glob("part-*"))))


def clips():
    """The test takes of the Free Spoken Digits: digit and samples."""
    if not (FSDD / "metadata.csv").is_file():
        pytest.skip("MANYHEADS_DATA has no fsdd")
    rows = {row["file"]: row for row in csv.DictReader((FSDD / "metadata.csv").open())}
    found = {}
    with tarfile.open(FSDD / "fsdd_flac.tar") as archive:
        for member in archive:
            about = rows.get(Path(member.name).name.replace(".wav", ".flac"))
            if about and about["split"] == "test":
                samples = soundfile.read(io.BytesIO(archive.extractfile(member).read()), dtype="float32")[0]
                found.setdefault(about["speaker"], []).append((about["digit"], samples))
    return list(found.values())


def hush(draw, low, high):
    count = int(draw.uniform(low, high) * RATE)
    return np.random.default_rng(draw.randrange(1 << 30)).normal(0, 1e-4, count).astype(np.float32)


def utterance(draw, speakers, most=8):
    """Connected digits of one speaker: text, samples, and where each digit begins and ends in them."""
    speaker = draw.choice(speakers)
    text, parts, places, size = "", [], [], 0
    for digit, samples in (draw.choice(speaker) for _ in range(draw.randint(3, most))):
        pause = hush(draw, 0.05, 0.25) if parts else samples[:0]
        places.append((size + len(pause), size + len(pause) + len(samples)))
        size, text = places[-1][1], text + digit
        parts += [pause, samples]
    return text, np.concatenate(parts), places


def write_long(path, speakers, seconds, seed):
    """One recording of many utterances with pauses between; text of each, and the digits' times in ms."""
    draw, truth, place = random.Random(seed), [], 0
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        while place < seconds * RATE:
            pause = hush(draw, 0.7, 3.0)
            text, samples, places = utterance(draw, speakers)
            begin = place + len(pause)
            truth.append(
                (text, [((begin + a) * 1000 // RATE, (begin + b) * 1000 // RATE) for a, b in places])
            )
            file.write(pause)
            file.write(samples)
            place = begin + len(samples)
        file.write(hush(draw, 1, 1.1))
    return truth


def start(*arguments):
    """Start `manyheads predict` in a process that prints its peak memory at the end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", COMMAND, "predict", *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)


def finish(process):
    """Wait for a run; its peak memory in MiB and its last line."""
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err
    return float(out), err.strip().splitlines()[-1]


def kill_after(process, output, parts):
    """Kill a run as soon as so many parts are there."""
    while len(list(output.glob("part-*"))) < parts:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "_SUCCESS").exists()


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("vad", ["silero", "energy"])
def test_five_hundred_files_and_two_hours(tmp_path, inspect_folder, vad):
    """500 recordings and one of two hours, killed twice: the same bytes, and the memory of a short one."""
    model = os.environ.get("MANYHEADS_DIGITS") or save(tmp_path / "model")
    speakers, draw, truth = clips(), random.Random(0), {}
    (tmp_path / "in").mkdir()
    for number in range(500):
        text, samples, _ = utterance(draw, speakers)
        truth[f"{number:03d}.wav"] = text
        whole = np.concatenate((hush(draw, 0.2, 1), samples, hush(draw, 0.2, 1)))
        soundfile.write(tmp_path / "in" / f"{number:03d}.wav", whole, RATE)
    said = write_long(tmp_path / "in" / "long.flac", speakers, 7200, 1)
    write_long(tmp_path / "short.flac", speakers, 600, 2)
    options = ["--vad", vad, "--subtitles", "srt", "--segment-seconds", 8]
    small, line = finish(start(model, tmp_path / "short.flac", "-o", tmp_path / "short", *options))
    print(f"\n{vad}: 10 minutes: {small:.0f} MiB; {line}")
    peak, line = finish(start(model, tmp_path / "in", "-o", tmp_path / "whole", *options))
    print(f"500 files and 2 hours: {peak:.0f} MiB; {line}")
    killed = tmp_path / "killed"
    kill_after(start(model, tmp_path / "in", "-o", killed, *options), killed, 4)
    kill_after(start(model, tmp_path / "in", "-o", killed, *options, "--resume"), killed, 9)
    _, line = finish(start(model, tmp_path / "in", "-o", killed, *options, "--resume"))
    print(f"killed twice: {line}")
    assert inspect_folder.digests(killed) == inspect_folder.digests(tmp_path / "whole")
    assert peak <= 1.15 * small

    rows = read(killed)
    assert set(rows.id) == {*truth, "long.flac"}
    found = rows[rows.id == "long.flac"]
    assert (
        found.start_ms.is_monotonic_increasing
        and (found.end_ms[:-1].values <= found.start_ms[1:].values).all()
    )
    segments = list(zip(found.start_ms, found.end_ms, strict=True))
    digits = [each for _, times in said for each in times]
    missed = sum(covered(segments, *each) < 0.5 for each in digits)  # many clips end with silence
    print(f"{len(digits)} digits in {len(found)} segments; {missed} digits less than half heard")
    assert missed <= 0.005 * len(digits)
    subtitles = cues(killed / "results" / "long.flac.srt")
    assert all(a[1] <= b[0] for a, b in pairwise(subtitles))
    assert "".join(text for _, _, text in subtitles).replace(" ", "") == "".join(found.text)
    if "MANYHEADS_DIGITS" in os.environ:
        report_errors(rows, truth, said)


def ends(times):
    return times[0][0], times[-1][1]


def covered(segments, start, end):
    """The share of a stretch that lies in segments."""
    return sum(max(0, min(b, end) - max(a, start)) for a, b in segments) / (end - start)


def report_errors(rows, truth, said):
    """Print and check the error rate of the digits, and how far their times are off in the long recording."""
    import jiwer

    texts = rows.groupby("id").text.agg("".join)
    files = jiwer.cer([truth[id] for id in truth], [texts[id] for id in truth])
    long = jiwer.cer("".join(text for text, _ in said), texts["long.flac"])
    print(f"character error rate: {files:.4f} of 500 files, {long:.4f} of 2 hours")
    found = rows[rows.id == "long.flac"]
    columns = (found.words, found.words_start_ms, found.words_end_ms)
    words = [word for row in zip(*columns, strict=True) for word in zip(*row, strict=True)]
    off, place = [], 0
    for text, times in said:
        start, _ = ends(times)
        while place < len(words) and words[place][2] < start - 200:
            place += 1
        own = words[place : place + len(times)]
        if "".join(word for word, _, _ in own) == text:
            off += [(a - c, b - d) for (_, a, b), (c, d) in zip(own, times, strict=True)]
    off = np.abs(np.array(off))
    mean, most = off.mean(0).round().tolist(), np.percentile(off, 95, axis=0).tolist()
    print(f"starts and ends of {len(off)} digits are off by {mean} ms, 95 % by at most {most}")
    assert files < 0.03 and long < 0.03
    assert len(off) > 0.8 * sum(len(text) for text, _ in said) and (off.mean(0) < 150).all()
