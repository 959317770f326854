"""From a decoded image to the model's input: resize, centre crop, normalise. The same everywhere.

The numbers are saved in the model folder, and prediction, explanations and k-NN use them alike.
Source: timm's evaluation transform (`create_transform(is_training=False)`), met to the last bits; done with
PIL and numpy alone, so that threads side by side do not share torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.vision.images import decode

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Resize: TypeAlias = Literal["shorter", "squash"]

MOST = 50_000_000  # pixels after the resize: a line of 1 x 100,000 would become 224 x 22,400,000
_CROP_MODES = {"center": "shorter", "squash": "squash"}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input, without chance.

    Args:
        size: Height and width of the input.
        channels: 3 (RGB) or 1 (grey).
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel.
        interpolation: The filter of the resize.
        crop_pct: Share of the resized image that the centre crop keeps, by its side.
        resize: `shorter` keeps the aspect and scales the shorter side; `squash` scales both sides.

    Raises:
        DataError: A value that means nothing.
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    resize: Resize = "shorter"

    def __post_init__(self) -> None:
        right = {
            "size": len(self.size) == 2 and all(isinstance(n, int) and n > 0 for n in self.size),
            "channels": self.channels in (1, 3),
            "mean": len(self.mean) == self.channels and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == self.channels and all(n > 0 and math.isfinite(n) for n in self.std),
            "interpolation": self.interpolation in get_args(Interpolation),
            "crop_pct": 0 < self.crop_pct <= 1,
            "resize": self.resize in get_args(Resize),
        }
        for name, good in right.items():
            if not good:
                raise DataError(f"the images' preprocessing has {name} = {getattr(self, name)!r}")

    @classmethod
    def from_timm(cls, cfg: Mapping[str, object], size: int | None = None) -> Preprocessing:
        """Take the numbers of a timm model's `pretrained_cfg`, and another size where one is given.

        Raises:
            DataError: It asks for what is not done here (`crop_mode` "border").
        """
        known = cast("dict[str, Any]", {key: value for key, value in cfg.items() if value is not None})
        channels, *default = known.get("input_size", (3, 224, 224))
        mode = known.get("crop_mode", "center")
        if mode not in _CROP_MODES:
            raise DataError(f"the model's pretrained_cfg has crop_mode = {mode!r}; known: center, squash")
        return cls(
            size=(size, size) if size else (default[0], default[1]),
            channels=channels,
            mean=tuple(known.get("mean", cls.mean))[:channels],
            std=tuple(known.get("std", cls.std))[:channels],
            interpolation=known.get("interpolation", "bicubic"),
            crop_pct=known.get("crop_pct", 0.875),
            resize=cast("Resize", _CROP_MODES[mode]),
        )

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> Preprocessing:
        """Take the numbers out of a model folder's `preprocessing`; other keys there are not ours.

        Raises:
            DataError: One is missing or means nothing.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in saved]
        if missing:
            raise DataError(f"the model's preprocessing has no {', '.join(missing)}")
        found: dict[str, Any] = {name: saved[name] for name in names}
        try:
            found.update({name: tuple(found[name]) for name in ("size", "mean", "std")})
            return cls(**found)
        except TypeError as error:
            raise DataError(f"the model's preprocessing does not fit: {error}") from error

    def to_json(self) -> dict[str, object]:
        """Return plain values, for the model folder."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @property
    def scaled(self) -> tuple[int, int]:
        """Height and width that the resize aims at, before the crop."""
        return math.floor(self.size[0] / self.crop_pct), math.floor(self.size[1] / self.crop_pct)

    def load(self, data: bytes | Path) -> Tensor:
        """Decode an image and apply this.

        A JPEG more than four times too large is decoded at a smaller scale, never below twice what the resize
        aims at. Its pixels then differ a little from those of the whole image (about 1 level of 255).

        Shape:
            `[C, H, W]`.

        Raises:
            BadRecord: It cannot be used, and why.
        """
        return self(decode(data, self.channels, at_least=max(self.scaled)))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised float32 image.

        Shape:
            `[C, H, W]`.

        Raises:
            BadRecord: An image so narrow that its resize would be gigantic.
        """
        image = image.convert("RGB" if self.channels == 3 else "L")
        width, height = self._resized(*image.size)
        if width * height > MOST:
            raise BadRecord(f"too narrow: {image.size[0]} x {image.size[1]} would become {width} x {height}")
        filter_ = Image.Resampling[self.interpolation.upper()]
        image = image.resize((width, height), filter_) if (width, height) != image.size else image
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        values = np.asarray(image, dtype=np.float32).reshape(*self.size, self.channels) / np.float32(255)
        mean, std = (np.array(each, dtype=np.float32) for each in (self.mean, self.std))
        return torch.from_numpy(np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1)))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize."""
        to_height, to_width = self.scaled
        if self.resize == "squash":
            return to_width, to_height
        if to_height != to_width:
            ratio = min(height / to_height, width / to_width)
            return round(width / ratio), round(height / ratio)
        if width <= height:  # torchvision's rounding, not the same
            return to_width, int(to_height * height / width)
        return int(to_width * width / height), to_height
