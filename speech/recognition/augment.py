"""What is changed by chance in training: speed, masked bands and stretches (SpecAugment), a little noise.

Sources: Ko et al. 2015 (speed); Park et al. 2019 (arXiv 1904.08779). The numbers are those that Paraformer
was published with: rows of stacked frames are masked, and a band in all frames of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
import torchaudio.functional as AF
from torch import Tensor
from torchaudio.transforms import Resample

from manyheads.core.errors import UsageError


@dataclass(frozen=True)
class Augment:
    """What is done to training utterances by chance.

    Args:
        speeds: One is drawn for each utterance; 1.1 is a tenth faster, and higher.
        frequency_masks: Bands that are masked.
        frequency_width: Channels of the filter bank that a band has at most.
        time_masks: Stretches that are masked.
        time_width: Rows that a stretch has at most.
        time_share: Share of an utterance that a stretch has at most.
        dither: Noise added to the samples as 16-bit numbers, as Kaldi does.
    """

    speeds: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    frequency_masks: int = 1
    frequency_width: int = 30
    time_masks: int = 1
    time_width: int = 12
    time_share: float = 1.0
    dither: float = 1.0

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise UsageError(f"augment.speeds must be some numbers from 0.5 to 2, not {self.speeds}")
        for name in ("frequency_masks", "frequency_width", "time_masks", "time_width", "dither"):
            if getattr(self, name) < 0:
                raise UsageError(f"augment.{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.time_share <= 1:
            raise UsageError(f"augment.time_share must be from 0 to 1, not {self.time_share}")


@contextmanager
def drawn_from(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Let torch's random numbers follow from these three; what they were before goes on afterwards."""
    mixed = (
        seed * 1_000_003 + epoch
    ) * 1_000_003 + index  # wide apart in what matters, and never equal nearby
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
        yield


def change_speed(samples: Tensor, speeds: list[float]) -> Tensor:
    """Play faster or slower, by one of the speeds."""
    speed = speeds[int(torch.randint(len(speeds), ()))]
    changed: Tensor = samples if speed == 1 else _resample(round(speed * 100))(samples)
    return changed


@cache
def _resample(percent: int) -> Resample:
    return Resample(percent, 100)


def mask(rows: Tensor, mels: int, options: Augment) -> Tensor:
    """Mask bands and stretches of normalised rows: zero is the mean.

    Shape:
        rows and the result `[T, stack * mels]`.
    """
    frames = rows.unflatten(1, (-1, mels)).permute(1, 2, 0)  # [stack, mels, T]
    for _ in range(options.frequency_masks):
        frames = AF.mask_along_axis(frames, min(options.frequency_width, mels), 0.0, axis=1)
    for _ in range(options.time_masks):
        frames = AF.mask_along_axis(frames, options.time_width, 0.0, axis=2, p=options.time_share)
    return frames.permute(2, 0, 1).flatten(1)
