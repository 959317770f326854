"""Training images changed by chance: crops, flips, RandAugment, erasing.

What happens to an image is a function of (seed, epoch, ticket) alone; the ticket is its number, counted on
where an epoch draws it again. So it depends neither on worker processes nor on where a run was resumed.
Crops by scale and RandAugment work on one PIL image after another (torchvision's transforms); padding crops,
flips and erasing on a whole batch of pixels at once.

Source: RandAugment (https://arxiv.org/abs/1909.13719), random erasing (https://arxiv.org/abs/1708.04896).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from manyheads.core.errors import UsageError

Pixels = NDArray[np.uint8]
_DRAWS = 8  # numbers a batch's operations take for each image
_ERASED = (0.02, 1 / 3)  # share of the area, as in the paper
_LOWEST_RATIO = 0.3  # height to width of what is erased, at least; at most its inverse


@dataclass(frozen=True)
class Augment:
    """What is done to training images.

    Args:
        crop: "resized" cuts a part of random scale and aspect and resizes it; "pad" shifts the image by up to
            `pad` pixels over black; "none" leaves the evaluation's crop; "auto" is "pad" up to 64 pixels,
            else "resized".
        scale_min: Smallest share of the area that "resized" cuts.
        pad: Pixels that "pad" shifts by at most, to each side.
        flip: Mirror every other image.
        randaugment: Operations of RandAugment an image; 0 for none.
        magnitude: Their strength, 0 to 30.
        erasing: Share of images with an erased rectangle.

    Raises:
        UsageError: A value out of range.
    """

    crop: Literal["auto", "resized", "pad", "none"] = "auto"
    scale_min: float = 0.08
    pad: int = 4
    flip: bool = True
    randaugment: int = 0
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        right = {
            "scale_min": 0 < self.scale_min <= 1,
            "pad": self.pad >= 0,
            "randaugment": self.randaugment >= 0,
            "magnitude": 0 <= self.magnitude <= 30,
            "erasing": 0 <= self.erasing <= 1,
        }
        for name, good in right.items():
            if not good:
                raise UsageError(f"augment.{name} cannot be {getattr(self, name)}")


NO_AUGMENT = Augment(crop="none", flip=False)


def uniform(seed: int, epoch: int, tickets: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) for each ticket: splitmix64 over a counter, the same in any batch.

    Shape:
        tickets `[B]` -> `[B, count]`.
    """
    state: NDArray[np.uint64] = np.array(seed % (1 << 63), np.uint64)
    with np.errstate(over="ignore"):
        for value in (
            np.uint64(epoch),
            tickets.astype(np.uint64)[:, None],
            np.arange(count, dtype=np.uint64),
        ):
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) * (value + np.uint64(1)))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53, np.float64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


@contextmanager
def _own_numbers() -> Iterator[None]:
    """Keep torch's random state: torchvision draws from it, and the model's dropout must not notice."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Augmenter:
    """The operations of an `Augment` for one size of image.

    Args:
        options: What is done.
        size: Height and width.
        interpolation: Of the resized crop.
        seed: Seed of all chance.
    """

    def __init__(self, options: Augment, size: tuple[int, int], interpolation: str, seed: int) -> None:
        crop = options.crop
        if crop == "auto":
            crop = "pad" if max(size) <= 64 else "resized"
        self.options, self.size, self.seed, self.crop = options, size, seed, crop
        mode = InterpolationMode(interpolation)
        scale = (options.scale_min, 1.0)
        self._resized = v2.RandomResizedCrop(size, scale, interpolation=mode, antialias=True)
        nearest = InterpolationMode.NEAREST
        self._ops = v2.RandAugment(options.randaugment, options.magnitude, interpolation=nearest, fill=128)

    @property
    def single(self) -> bool:
        """Whether anything is done image by image."""
        return self.crop == "resized" or self.options.randaugment > 0

    def images(
        self, images: list[Image.Image], epoch: int, tickets: NDArray[np.integer]
    ) -> list[Image.Image]:
        """Crop images by scale, and apply RandAugment."""
        if not self.single:
            return images
        seeds = (uniform(self.seed, epoch, tickets, _DRAWS + 1)[:, -1] * 2.0**53).astype(np.int64)
        found = []
        with _own_numbers():
            for image, seed in zip(images, seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(seed)
                cropped = self._resized(image) if self.crop == "resized" else image
                found.append(self._ops(cropped) if self.options.randaugment else cropped)
        return found

    def batch(self, pixels: Pixels, epoch: int, tickets: NDArray[np.integer]) -> Pixels:
        """Shift and mirror a batch of images.

        Shape:
            pixels `[B, H, W, C]`, returns the same.
        """
        if self.crop != "pad" and not self.options.flip:
            return pixels
        drawn, pad = uniform(self.seed, epoch, tickets, _DRAWS), self.options.pad
        if self.crop == "pad" and pad:
            padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            places = np.lib.stride_tricks.sliding_window_view(padded, self.size, axis=(1, 2))
            top, left = (drawn[:, :2] * (2 * pad + 1)).astype(np.int64).T
            pixels = places[np.arange(len(pixels)), top, left].transpose(0, 2, 3, 1)
        if self.options.flip:
            mirrored = drawn[:, 2, None, None, None] < 0.5
            pixels = np.where(mirrored, pixels[:, :, ::-1], pixels)
        return pixels

    def erased(self, epoch: int, tickets: NDArray[np.integer]) -> NDArray[np.bool_] | None:
        """Return which pixels of a batch are erased; None if nothing ever is.

        Shape:
            `[B, H, W]`.
        """
        if not self.options.erasing:
            return None
        drawn, (height, width) = uniform(self.seed, epoch, tickets, _DRAWS)[:, 3:], self.size
        area = (_ERASED[0] + drawn[:, 1] * (_ERASED[1] - _ERASED[0])) * height * width
        ratio = np.exp((2 * drawn[:, 2] - 1) * -math.log(_LOWEST_RATIO))
        tall = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
        wide = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
        top = np.floor(drawn[:, 3] * (height - tall + 1))
        left = np.floor(drawn[:, 4] * (width - wide + 1))
        rows, columns = np.arange(height), np.arange(width)
        inside = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # [B, H]
        beside = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # [B, W]
        taken = drawn[:, 0] < self.options.erasing
        return taken[:, None, None] & inside[:, :, None] & beside[:, None, :]
