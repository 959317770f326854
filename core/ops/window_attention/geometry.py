"""Which tokens of an image make a window: the arithmetic that all backends share."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Partition = Literal["window", "grid", "stripe_h", "stripe_v"]
PARTITIONS = ("window", "grid", "stripe_h", "stripe_v")
Pair = int | tuple[int, int]


class Geometry(NamedTuple):
    """An image cut into windows of one size.

    Attributes:
        height, width: Of the image, in tokens.
        window_h, window_w: Of a window, in tokens.
        shift_h, shift_w: By how much windows are moved down and to the right; they wrap at the border.
        grid: A window's tokens are spread evenly over the whole image instead of side by side.
    """

    height: int
    width: int
    window_h: int
    window_w: int
    shift_h: int = 0
    shift_w: int = 0
    grid: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a window, n."""
        return self.window_h * self.window_w

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return (self.height // self.window_h) * (self.width // self.window_w)

    @property
    def shifted(self) -> bool:
        """Whether some windows are joined across the border."""
        return self.shift_h > 0 or self.shift_w > 0


def geometry(height: int, width: int, window: Pair, shift: Pair, partition: str) -> Geometry:
    """Resolve what the caller asked for, or say what does not fit.

    Raises:
        TypeError: window or shift is neither an int nor a pair of ints.
        ValueError: An unknown partition, or sizes that do not fit the image.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"window_attention: partition must be one of {PARTITIONS}, not {partition!r}")
    window_h, window_w = _pair("window", window, partition)
    shift_h, shift_w = _pair("shift", shift, partition)
    if partition == "stripe_h":
        window_w, shift_w = width, 0
    elif partition == "stripe_v":
        window_h, shift_h = height, 0
    elif partition == "grid" and (shift_h or shift_w):
        raise ValueError("window_attention: a grid covers the whole image: it takes no shift")
    for axis, size, part, by in (("H", height, window_h, shift_h), ("W", width, window_w, shift_w)):
        if part < 1 or size % part:
            raise ValueError(
                f"window_attention: {axis} = {size} is not a multiple of the window's {part}; pad the image "
                "before its projection to q, k, v, as Swin does, and crop the result"
            )
        if not 0 <= by < part:
            raise ValueError(f"window_attention: shift along {axis} must be in [0, {part}), not {by}")
    return Geometry(height, width, window_h, window_w, shift_h, shift_w, partition == "grid")


def _pair(name: str, value: Pair, partition: str) -> tuple[int, int]:
    if isinstance(value, bool) or not isinstance(value, (int, tuple, list)):
        raise TypeError(f"window_attention: {name} must be an int or a pair of ints, not {value!r}")
    if isinstance(value, int):
        return value, value
    if partition.startswith("stripe"):
        raise ValueError(f"window_attention: a stripe runs across the image: {name} must be one int")
    if len(value) != 2 or not all(isinstance(x, int) for x in value):
        raise TypeError(f"window_attention: {name} must be an int or a pair of ints, not {value!r}")
    return value[0], value[1]


class Layout(NamedTuple):
    """The tokens of each window.

    Attributes:
        places: `[windows, n]`, int64: each token's place `y * width + x` in the image.
        region: `[windows, n]`, uint8: tokens of a window see each other where their numbers agree.
        plain: How many windows, the first ones, have all their tokens in one region.
    """

    places: Tensor
    region: Tensor
    plain: int


@lru_cache(maxsize=64)
def layout(where: Geometry) -> Layout:
    """List the windows' tokens on the CPU, windows joined across the border last."""
    rows, columns = where.height // where.window_h, where.width // where.window_w
    y = _axis(where.height, where.window_h, where.shift_h, where.grid)  # [rows, window_h]
    x = _axis(where.width, where.window_w, where.shift_w, where.grid)  # [columns, window_w]
    wrapped_y, wrapped_x = (y >= where.height).to(torch.uint8), (x >= where.width).to(torch.uint8)
    shape = (rows, columns, where.window_h, where.window_w)
    index = (y % where.height)[:, None, :, None] * where.width + (x % where.width)[None, :, None, :]
    region = 2 * wrapped_y[:, None, :, None] + wrapped_x[None, :, None, :]
    index, region = (t.expand(shape).reshape(rows * columns, -1) for t in (index, region))
    mixed = (region != region[:, :1]).any(1)
    order = torch.argsort(mixed.to(torch.int8), stable=True)
    return Layout(index[order].contiguous(), region[order].contiguous(), int((~mixed).sum()))


def _axis(size: int, window: int, shift: int, grid: bool) -> Tensor:
    """Where the tokens of each window lie along an axis; size and more where they wrap around."""
    if grid:
        return torch.arange(size, device="cpu").view(window, size // window).t()
    return torch.arange(size, device="cpu").view(size // window, window) + shift
