"""Silero's network and the gate on the level: what they take for speech, in pieces and whole."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import soundfile
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.recognition import vad
from manyheads.speech.recognition.vad import EnergyGate, Silero, levels, make_detector, window_of

RATE = 16000


def sentence():
    """Real speech (16 kHz) between two seconds of faint noise."""
    data = Path(os.environ.get("MANYHEADS_DATA", "/nowhere")) / "speech/speechbrain_samples"
    path = data / "spk1_snt1.flac"
    if not path.is_file():
        pytest.skip("MANYHEADS_DATA has no speech")
    said = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    quiet = torch.randn(2 * RATE) * 1e-4
    return torch.cat((quiet, said, quiet)), len(said)


def whole_windows(samples, window):
    return samples[: len(samples) // window * window]


@pytest.mark.parametrize("kind", ["silero", "energy"])
def test_finds_a_sentence(kind):
    samples, said = sentence()
    detector = make_detector(kind, RATE)
    chance = detector.push(whole_windows(samples, detector.window))
    assert ((chance >= 0) & (chance <= 1)).all()
    seconds = torch.arange(len(chance)) * detector.window / RATE
    inside = (seconds > 2.1) & (seconds < 2 + said / RATE - 0.1)
    outside = (seconds < 1.9) | (seconds > 2 + said / RATE + 0.3)
    assert (chance[inside] > 0.5).float().mean() > 0.6
    assert (chance[outside] < 0.35).all()


@pytest.mark.parametrize("kind", ["silero", "energy"])
@pytest.mark.parametrize("rate", [8000, 16000])
def test_pieces_equal_the_whole(kind, rate):
    samples, _ = sentence()
    whole, pieces = make_detector(kind, rate), make_detector(kind, rate)
    assert whole.window == pieces.window == {8000: 256, 16000: 512}[rate]
    samples = whole_windows(samples, whole.window)
    wanted = whole.push(samples)
    sizes = [1, 3, 0, 20]
    sizes.append(len(wanted) - sum(sizes))
    found = [pieces.push(part) for part in samples.split([size * whole.window for size in sizes])]
    assert torch.equal(torch.cat(found), wanted)
    whole.reset()
    assert torch.equal(whole.push(samples), wanted)


def test_gate_and_noise():
    gate = EnergyGate(RATE)
    hiss = torch.randn(RATE * 40 // 512 * 512) * 10 ** (-45 / 20)
    chance = gate.push(hiss)
    assert (chance < 0.5).all()  # steady, however loud
    louder = torch.randn(RATE * 30 // 512 * 512) * 10 ** (-25 / 20)
    chance = gate.push(louder)
    assert chance[0] > 0.5 and (chance[-200:] < 0.5).all()  # it becomes louder: taken for noise after 20 s
    gate.reset()
    assert gate.push(louder)[0] > 0.5
    gate.reset()
    gate.push(torch.zeros(51200))
    after = gate.push(torch.randn(5120) * 10 ** (-57 / 20))
    assert (after < 0.5).all()  # digital silence before does not make hiss of it


def test_levels():
    tone = 0.5 * 2**0.5 * torch.sin(torch.arange(1024) * 2 * torch.pi / 64)
    assert torch.allclose(
        levels(torch.cat((tone, torch.zeros(512))), 512), torch.tensor([-6.02, -6.02, -100.0]), atol=0.01
    )
    assert torch.allclose(levels(tone + 0.3, 512), levels(tone, 512), atol=1e-3)  # a constant is no sound
    assert window_of(22050) == 705 and len(EnergyGate(22050).push(torch.zeros(1410))) == 2
    for kind in ("silero", "energy"):
        assert len(make_detector(kind, RATE).push(torch.zeros(0))) == 0


def test_refusals(monkeypatch):
    assert make_detector("none", RATE) is None
    with pytest.raises(UsageError, match="did you mean 'silero'"):
        make_detector("sileros", RATE)
    with pytest.raises(UsageError, match="8000 and 16000 Hz, and the model takes 44100: choose vad energy"):
        Silero(44100)
    for kind in ("silero", "energy"):
        with pytest.raises(DataError, match="no whole windows of 512"):
            make_detector(kind, RATE).push(torch.zeros(513))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"install manyheads\[speech\], or choose vad energy"):
        make_detector("silero", RATE)


def test_threads_stay(monkeypatch):
    """The package's own import would set torch to one thread."""
    torch.set_num_threads(2)
    vad._load_network()
    assert torch.get_num_threads() == 2
