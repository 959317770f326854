"""Mixtures: the same for the same numbers, the levels, rooms and noise asked for, and speakers kept apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.audio import write
from manyheads.speech.separation.mixing import Mixer, Mixing, room_response
from manyheads.speech.separation.voices import Voices
from manyheads.speech.sources import list_audio

RATE = 8000
LENGTHS = {"a": [9000, 4000], "b": [12000], "c": [20000], "d": [6000]}


def tone(frequency: float, length: int) -> torch.Tensor:
    return 0.2 * torch.sin(torch.arange(length) * (2 * math.pi * frequency / RATE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four speakers, each a tone of its own."""
    for n, (name, lengths) in enumerate(LENGTHS.items()):
        (tmp_path / name).mkdir()
        for k, length in enumerate(lengths):
            write(tmp_path / name / f"{name}{k}.wav", tone(200 + 300 * n, length), RATE, "FLOAT")
    return tmp_path


def voices(folder: Path, rate: int = RATE, **more) -> Voices:
    refs = list(list_audio(folder))
    return Voices(str(folder), refs, [ref.id.split("/")[0] for ref in refs], rate, **more)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


FULL = Mixing(
    seconds=0.5,
    speeds=[0.9, 1.1],
    reverberation=0.5,
    noise="white",
)


def same(one, other) -> bool:
    return (
        one.id == other.id
        and torch.equal(one.mixture, other.mixture)
        and torch.equal(one.sources, other.sources)
    )


def test_a_mixture_is_a_function_of_its_numbers(folder):
    one, other = (Mixer(voices(folder, cache_mib=mib), 50, 2, FULL, seed=3) for mib in (100, 0))
    order = [(7, 1), (3, 0), (7, 0), (3, 0)]
    first = {key: one.sample(*key) for key in order}
    for key in reversed(order):  # in another order, without the cache
        assert same(other.sample(*key), first[key])
    assert not same(first[7, 0], first[7, 1])
    assert not same(first[3, 0], first[7, 0])
    assert not same(Mixer(voices(folder), 50, 2, FULL, seed=4).sample(3), first[3, 0])


def test_the_mixture_is_the_sum_and_its_voices_are_different_ones(folder):
    mixer = Mixer(voices(folder), 100, 3, Mixing(seconds=0.4))
    for index in range(30):
        found = mixer.sample(index)
        assert found.sources.shape == (3, 3200)
        torch.testing.assert_close(found.sources.sum(0), found.mixture)
        assert len({name[0] for name in found.id.split("_")}) == 3


def test_levels_are_those_asked_for(folder):
    mixer = Mixer(voices(folder), 200, 2, Mixing(seconds=0.4, levels=[-40.0, -20.0]))
    levels = torch.cat([20 * rms(mixer.sample(n).sources).log10() for n in range(200)])
    assert levels.min() >= -40.01
    assert levels.max() <= -19.99
    assert levels.min() < -38
    assert levels.max() > -22  # all of the range is used


def test_speed_changes_the_pitch_and_not_the_length(folder):
    mixer = Mixer(voices(folder), 60, 2, Mixing(seconds=0.45, speeds=[1.1]))
    for index in range(10):
        found = mixer.sample(index)
        assert found.sources.shape == (2, 3600)
        for source, name in zip(found.sources, found.id.split("_"), strict=True):
            peak = torch.fft.rfft(source * torch.hann_window(3600)).abs().argmax().item() * RATE / 3600
            assert peak == pytest.approx(1.1 * (200 + 300 * "abcd".index(name[0])), abs=3)


def test_min_cuts_and_max_fills_up(folder):
    short = Mixer(voices(folder), 40, 2, Mixing(mode="min"), whole=True)
    long = Mixer(voices(folder), 40, 2, Mixing(mode="max"), whole=True)
    lengths = {f"{name}{k}": n for name, each in LENGTHS.items() for k, n in enumerate(each)}
    for index in range(40):
        cut, filled = short.sample(index), long.sample(index)
        own = [lengths[name] for name in cut.id.split("_")]
        assert cut.id == filled.id
        assert cut.sources.shape[1] == min(own)
        assert filled.sources.shape[1] == max(own)
        for source, length in zip(filled.sources, own, strict=True):
            assert (source[length:] == 0).all()
            assert -33.01 <= 20 * rms(source[:length]).log10() <= -24.99  # of the voice, not of the silence


def test_whole_recordings_are_the_same_each_epoch(folder):
    mixer = Mixer(voices(folder), 10, 2, replace(FULL, reverberation=0.0, noise=None), whole=True)
    assert same(mixer.sample(4, 0), mixer.sample(4, 9))
    assert mixer.sample(4).sources.shape[1] in (4000, 6000, 9000, 12000)  # at their own speed


def test_training_mixtures_in_max_mode_have_one_length(folder):
    mixer = Mixer(voices(folder), 40, 2, Mixing(seconds=2.0, mode="max"))
    found = [mixer.sample(n) for n in range(20)]
    assert {each.mixture.shape for each in found} == {(16000,)}
    assert any((each.sources[:, :100] == 0).all(1).any() for each in found)  # they begin anywhere


@pytest.mark.parametrize("target", ["reverberant", "dry"])
def test_a_room_is_put_around_the_voices(folder, target):
    options = Mixing(seconds=0.5, reverberation=1.0, target=target)
    wet = Mixer(voices(folder), 10, 2, options).sample(1)
    plain = Mixer(voices(folder), 10, 2, Mixing(seconds=0.5)).sample(1)
    assert wet.id == plain.id
    assert torch.equal(wet.sources, plain.sources) == (target == "dry")
    assert not torch.allclose(wet.mixture, plain.mixture, atol=1e-4)
    assert torch.allclose(wet.sources.sum(0), wet.mixture, atol=1e-6) == (target == "reverberant")


def test_a_room_dies_away_as_it_should():
    response = room_response(np.random.default_rng(0), 0.4, RATE, 200).double()
    assert response.shape == (200, 3200)
    assert (response[:, 0] == 1).all()
    tail = response[:, 1:].square()
    loud = 10 * tail.sum(1).log10()
    assert loud.min() > -12.01
    assert loud.max() < 0.01
    energy = (tail / tail.sum(1, keepdim=True)).mean(0)
    early, late = energy[:160].mean(), energy[1600:1760].mean()  # 0.2 s, half of the time, apart
    assert 10 * (early / late).log10().item() == pytest.approx(30, abs=1)


def test_noise_lies_as_far_below_as_asked_for(folder, tmp_path_factory):
    plain = Mixer(voices(folder), 40, 2, Mixing(seconds=0.5))
    sounds = tmp_path_factory.mktemp("noise")
    write(sounds / "hiss.wav", 0.1 * torch.randn(1000).clamp(-5, 5), RATE)  # shorter than a mixture
    refs = list(list_audio(sounds))
    recorded = Voices("noise", refs, ["noise"], RATE)
    for noise, given in (("white", None), (str(sounds), recorded)):
        noisy = Mixer(
            voices(folder), 40, 2, Mixing(seconds=0.5, noise=noise, noise_db=[10.0, 10.0]), noise=given
        )
        for index in range(5):
            one, other = plain.sample(index), noisy.sample(index)
            assert torch.equal(one.sources, other.sources)
            below = 20 * (rms(one.mixture) / rms(other.mixture - one.mixture)).log10()
            assert below.item() == pytest.approx(10, abs=0.05)


def test_another_rate_is_resampled(folder):
    mixer = Mixer(voices(folder, 16000), 10, 2, Mixing(seconds=0.5))
    assert mixer.sample(0).mixture.shape == (8000,)


def test_a_silent_voice_is_refused_by_name(folder):
    write(folder / "a" / "a0.wav", torch.zeros(9000), RATE)
    write(folder / "a" / "a1.wav", torch.zeros(4000), RATE)
    mixer = Mixer(voices(folder), 10, 4, Mixing(seconds=0.4))
    with pytest.raises(DataError, match=r"of speaker a 20 pieces are silent, as of a[01]"):
        mixer.sample(0)


def test_silent_pieces_are_passed_over(folder):
    half = torch.cat((torch.zeros(9000), tone(200, 9000)))
    write(folder / "a" / "a0.wav", half, RATE)
    mixer = Mixer(voices(folder), 40, 4, Mixing(seconds=0.2))
    for index in range(40):
        assert (rms(mixer.sample(index).sources) > 0.01).all()


def test_a_damaged_recording_is_refused_by_name(folder):
    path = folder / "b" / "b0.wav"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"b/b0.wav cannot be used \(.*truncated"):
        voices(folder)


def test_too_few_voices_are_refused(folder):
    with pytest.raises(DataError, match="4 voices are not enough to mix 5"):
        Mixer(voices(folder), 10, 5, Mixing())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [-20.0, -30.0]}, "mixing.levels must be the lowest and the highest"),
        ({"levels": [-20.0]}, "mixing.levels"),
        ({"noise_db": [0.0, math.inf]}, "mixing.noise_db"),
        ({"speeds": []}, "mixing.speeds must be from 0.5 to 2"),
        ({"speeds": [3.0]}, "mixing.speeds"),
        ({"reverberation": 1.5}, "mixing.reverberation must be a share"),
        ({"seconds": 0.0}, "must be above 0"),
        ({"decay_seconds": [0.0, 1.0]}, "must be above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Mixing(**options)
