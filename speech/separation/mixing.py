"""Mixtures of voices, made when they are asked for: other ones each epoch, the same for the same numbers.

A mixture is a function of (seed, epoch, index): who speaks, which piece of which recording, how fast, how
loud, in which room, in which noise. For validation and test recordings are whole, and each epoch's the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import fftconvolve

from manyheads.core.errors import DataError, UsageError
from manyheads.speech.separation.voices import Voices

Mode = Literal["min", "max"]

SILENT = 1e-4  # a piece of less than this root mean square (-80 dB) is no voice
_TRIES = 20  # pieces drawn for one that is not silent


@dataclass(frozen=True)
class Mixing:
    """How voices are mixed.

    Args:
        seconds: Of a training mixture.
        mode: "min" cuts all voices to the shortest; "max" fills the shorter ones up with silence.
        levels: Lowest and highest level of a voice, in dB of its root mean square below full scale.
        speeds: A training voice is made so many times as fast, and higher, by one of them by chance.
        reverberation: Share of the mixtures that are put into a room.
        decay_seconds: Shortest and longest time in which a room's sound falls by 60 dB.
        target: What is to be found in a room: the "reverberant" voices, or the "dry" ones.
        noise: "white", or a folder of recordings of noise; None for none.
        noise_db: Least and most that the noise lies below the voices together, in dB.
        noise_share: Share of the mixtures that have noise.
    """

    seconds: float = 2.0
    mode: Mode = "min"
    levels: list[float] = field(default_factory=lambda: [-33.0, -25.0])
    speeds: list[float] = field(default_factory=lambda: [1.0])
    reverberation: float = 0.0
    decay_seconds: list[float] = field(default_factory=lambda: [0.1, 0.6])
    target: Literal["reverberant", "dry"] = "reverberant"
    noise: str | None = None
    noise_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    noise_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("levels", "decay_seconds", "noise_db"):
            pair = getattr(self, name)
            if len(pair) != 2 or not (all(map(math.isfinite, pair)) and pair[0] <= pair[1]):
                raise UsageError(f"mixing.{name} must be the lowest and the highest, not {list(pair)}")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise UsageError(f"mixing.speeds must be from 0.5 to 2, not {list(self.speeds)}")
        for name in ("reverberation", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"mixing.{name} must be a share from 0 to 1, not {getattr(self, name)}")
        if not 0 < self.seconds < math.inf or self.decay_seconds[0] <= 0:
            raise UsageError("mixing.seconds and mixing.decay_seconds must be above 0")


@dataclass(frozen=True)
class Mixture:
    """A mixture and its voices.

    Args:
        id: Made of the recordings' ids.
        mixture: The sum of what is heard.
        sources: What is to be found.

    Shape:
        mixture `[L]`, sources `[N, L]`, float32.
    """

    id: str
    mixture: Tensor
    sources: Tensor


class Mixer:
    """Mixes voices, by number.

    Args:
        voices: Who speaks.
        count: How many mixtures an epoch has.
        speakers: Voices of a mixture.
        options: How they are mixed.
        seed: Of the choice of everything.
        whole: Mix whole recordings at their own speed, the same ones each epoch: for validation and test.
        noise: Recordings of noise, where `options.noise` names some.

    Raises:
        DataError: There are fewer voices than speakers.
    """

    def __init__(
        self,
        voices: Voices,
        count: int,
        speakers: int,
        options: Mixing,
        seed: int = 0,
        whole: bool = False,
        noise: Voices | None = None,
    ) -> None:
        if len(voices.names) < speakers:
            raise DataError(f"{voices.source}: {len(voices.names)} voices are not enough to mix {speakers}")
        self.voices, self.count, self.speakers, self.options = voices, count, speakers, options
        self.seed, self.whole, self.noise = seed, whole, noise

    @property
    def source(self) -> str:
        """Where the voices come from."""
        return self.voices.source

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, epoch: int = 0) -> Mixture:
        """Mix.

        Raises:
            DataError: A recording cannot be read, or a voice is silent.
        """
        rng = np.random.default_rng([self.seed, index, 0 if self.whole else epoch + 1])
        chosen = rng.choice(len(self.voices.names), self.speakers, replace=False)
        ids, pieces = zip(*(self._voice(int(speaker), rng) for speaker in chosen), strict=True)
        sources = self._together(pieces, rng)
        sources = sources / _rms(sources) * _drawn(self.options.levels, rng, self.speakers)
        heard, sources = self._in_room(sources, rng)
        mixture = heard.sum(0)
        if self.options.noise is not None and rng.random() < self.options.noise_share:
            mixture = mixture + self._noise(mixture, rng)
        return Mixture("_".join(ids), mixture, sources)

    def _voice(self, speaker: int, rng: np.random.Generator) -> tuple[str, Tensor]:
        """Return a recording's name and a piece of it that is not silent."""
        voices = self.voices
        clips = voices.clips[speaker]
        for _ in range(_TRIES):
            clip = int(rng.choice(clips, p=voices.chances[speaker]))
            piece = self._piece(voices, clip, rng)
            if _rms(piece) > SILENT:
                return voices.ids[clip], piece
        raise DataError(
            f"{voices.source}: of speaker {voices.names[speaker]} {_TRIES} pieces are silent, as of "
            f"{voices.ids[clip]}"
        )

    def _piece(self, voices: Voices, clip: int, rng: np.random.Generator) -> Tensor:
        length = int(voices.lengths[clip])
        if self.whole:
            return voices.read(clip, 0, length)
        wanted = max(1, round(self.options.seconds * voices.sample_rate))
        percent = round(100 * self.options.speeds[int(rng.integers(len(self.options.speeds)))])
        needed = math.ceil(wanted * percent / 100)
        start = int(rng.integers(length - needed + 1)) if length > needed else 0
        piece = voices.read(clip, start, min(length, start + needed))
        return (piece if percent == 100 else _resampler(percent)(piece))[:wanted]

    def _together(self, pieces: Sequence[Tensor], rng: np.random.Generator) -> Tensor:
        """Give all voices one length. In "max" whole recordings begin together, others anywhere."""
        lengths = [len(piece) for piece in pieces]
        if self.options.mode == "min":
            return torch.stack([piece[: min(lengths)] for piece in pieces])
        most = max(lengths)
        if not self.whole:
            most = max(most, round(self.options.seconds * self.voices.sample_rate))
        starts = [0 if self.whole else int(rng.integers(most - each + 1)) for each in lengths]
        padded = (F.pad(p, (s, most - s - len(p))) for p, s in zip(pieces, starts, strict=True))
        return torch.stack(list(padded))

    def _in_room(self, sources: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return what is heard of each voice, and what is to be found of it."""
        if not rng.random() < self.options.reverberation:
            return sources, sources
        low, high = self.options.decay_seconds
        response = room_response(rng, rng.uniform(low, high), self.voices.sample_rate, len(sources))
        heard = fftconvolve(sources, response)[:, : sources.shape[1]]
        return heard, heard if self.options.target == "reverberant" else sources

    def _noise(self, mixture: Tensor, rng: np.random.Generator) -> Tensor:
        length = len(mixture)
        if self.noise is None:
            noise = torch.from_numpy(rng.standard_normal(length, dtype=np.float32))
        else:
            clip = int(rng.integers(len(self.noise.ids)))
            whole = int(self.noise.lengths[clip])
            start = int(rng.integers(max(1, whole - length + 1)))
            noise = self.noise.read(clip, start, min(whole, start + length))
            noise = noise.repeat(-(-length // len(noise)))[:length]
            if not _rms(noise) > SILENT:
                return torch.zeros(length)
        least, most = self.options.noise_db
        down = rng.uniform(least, most)
        return noise / _rms(noise) * _rms(mixture) * 10 ** (-down / 20)


def room_response(rng: np.random.Generator, decay_seconds: float, sample_rate: int, places: int) -> Tensor:
    """Return a room's responses from several places: the direct sound, then noise that dies away.

    The reverberation is, all in all, as loud as the direct sound at most, and 12 dB below it at least.

    Args:
        rng: Draws the noise, and how loud it is from each place.
        decay_seconds: In which the sound falls by 60 dB.
        sample_rate: In Hz.
        places: How many.

    Shape:
        `[places, L]`, float32.
    """
    count = max(2, round(decay_seconds * sample_rate))
    falling = 10 ** (-3 * np.arange(1, count) / count)
    tail = rng.standard_normal((places, count - 1)) * falling
    loud = 10 ** (rng.uniform(-12, 0, (places, 1)) / 20)
    tail *= loud / np.linalg.norm(tail, axis=1, keepdims=True)
    return torch.from_numpy(np.concatenate((np.ones((places, 1)), tail), 1).astype(np.float32))


def _rms(samples: Tensor) -> Tensor:
    """Return the root mean square of where there is sound: what was filled up does not count."""
    sounding = (samples != 0).sum(-1, keepdim=True).clamp(min=1)
    return (samples.square().sum(-1, keepdim=True) / sounding).sqrt()


def _drawn(decibels: Sequence[float], rng: np.random.Generator, count: int) -> Tensor:
    lowest, highest = decibels
    levels = rng.uniform(lowest, highest, (count, 1))
    return torch.from_numpy(10 ** (levels / 20)).float()


@lru_cache(maxsize=64)
def _resampler(percent: int) -> nn.Module:
    """Return what makes a voice so many hundredths as fast, and higher."""
    from torchaudio.transforms import Resample

    return Resample(percent, 100)
