"""From a decoded image to the model's input: resize, centre crop, normalise. The same everywhere.

The numbers are saved in the model folder, and prediction, explanations and k-NN use them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image
from torch import Tensor

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Resize: TypeAlias = Literal["shorter", "squash"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input, without chance; what timm's evaluation transform does.

    Args:
        size: Height and width of the input.
        channels: 3 (RGB) or 1 (grey).
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel.
        interpolation: The filter of the resize.
        crop_pct: Share of the resized image that the centre crop keeps, by its side.
        resize: `shorter` keeps the aspect and scales the shorter side; `squash` scales both sides.

    Raises:
        DataError: A number that means nothing.
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    resize: Resize = "shorter"

    @classmethod
    def from_timm(cls, cfg: Mapping[str, object]) -> Preprocessing:
        """Take the numbers of a timm model's `pretrained_cfg`."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> Preprocessing:
        """Take the numbers out of a model folder's `preprocessing`; other keys there are not ours."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """Return plain values, for the model folder."""
        raise NotImplementedError

    def load(self, data: bytes | Path) -> Tensor:
        """Decode an image (`images.decode`, a large JPEG at a smaller scale) and apply this: `[C, H, W]`."""
        raise NotImplementedError

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised float32 image `[C, H, W]`."""
        raise NotImplementedError
