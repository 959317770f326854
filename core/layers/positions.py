"""Absolute and rotary positions: learned and sinusoidal tables, rotary angles, tables for other image sizes.

Biases by relative position are in `manyheads.core.layers.position_bias`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """Add a learned vector for each position.

    The parameter is `weight`, as that of an nn.Embedding.

    Args:
        length: Positions that the table has.
        dim: Width of the input.
        std: Of the normal distribution that the table starts from.

    Shape:
        x and the result: `[B, N, dim]`, N at most `length - offset`.

    Source:
        Gehring et al. 2017 (arXiv 1705.03122); Devlin et al. 2018 (arXiv 1810.04805).

    Example:
        >>> LearnedPositions(512, 64)(torch.zeros(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(self, length: int, dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, dim))
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the vectors of the positions from `offset` on.

        Raises:
            ValueError: The table ends before the last position.
        """
        last = offset + x.shape[1]
        if offset < 0 or last > len(self.weight):
            raise ValueError(
                f"positions {offset} to {last - 1}: the table has {len(self.weight)}, from 0 on; "
                "resize it with resize_position_embedding"
            )
        return x + self.weight[offset:last]


class SinusoidalPositions(nn.Module):
    """Add sines and cosines of each position; arguments as `sinusoidal_positions`.

    Shape:
        x and the result: `[B, N, dim]`.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762).
    """

    def __init__(
        self, dim: int, *, base: float = 10000.0, interleaved: bool = True, closed: bool = False
    ) -> None:
        super().__init__()
        frequencies(dim, base, closed)  # refuses what does not fit now, not at the first call
        self.dim, self.base, self.interleaved, self.closed = dim, base, interleaved, closed

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the table's rows from `offset` on, in x's dtype."""
        steps = torch.arange(offset, offset + x.shape[1], device=x.device)
        table = sinusoidal_positions(
            steps, self.dim, base=self.base, interleaved=self.interleaved, closed=self.closed
        )
        return x + table.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}, closed={self.closed}"


def sinusoidal_positions(
    positions: Tensor, dim: int, *, base: float = 10000.0, interleaved: bool = True, closed: bool = False
) -> Tensor:
    """Sines and cosines of positions, at wavelengths from 2 pi to `base` times that.

    Args:
        positions: Any numbers.
        dim: Width of the table; even.
        interleaved: Sine and cosine of a frequency side by side; otherwise all sines, then all cosines.
        closed: The last wavelength is `base` times the first (tensor2tensor, ESPnet), not one step before it.

    Shape:
        positions `[...]`; the result `[..., dim]`, float32.

    Raises:
        ValueError: dim is odd or too small.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762).

    Example:
        >>> sinusoidal_positions(torch.arange(100), 64).shape
        torch.Size([100, 64])
    """
    angles = positions.float()[..., None] * frequencies(dim, base, closed).to(positions.device)
    waves = (angles.sin(), angles.cos())
    return torch.stack(waves, -1).flatten(-2) if interleaved else torch.cat(waves, -1)


def sinusoidal_positions_2d(
    height: int,
    width: int,
    dim: int,
    *,
    base: float = 10000.0,
    x_first: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Sines and cosines of an image's rows and columns: half of the channels each, sines before cosines.

    Args:
        height, width: In tokens.
        dim: Width of the table, a multiple of four.
        x_first: The columns' half comes first (MAE); otherwise the rows'.

    Shape:
        The result: `[height, width, dim]`, float32.

    Raises:
        ValueError: dim is not a multiple of four.

    Source:
        Chen et al. 2021 (MoCo v3, arXiv 2104.02057); He et al. 2021 (MAE, arXiv 2111.06377).
    """
    if dim % 4:
        raise ValueError(f"sinusoidal_positions_2d: dim must be a multiple of 4, not {dim}")
    rows, columns = (
        sinusoidal_positions(torch.arange(n, device=device), dim // 2, base=base, interleaved=False)
        for n in (height, width)
    )
    halves = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(halves[::-1] if x_first else halves, -1)


def frequencies(dim: int, base: float = 10000.0, closed: bool = False) -> Tensor:
    """The angular frequencies of dim / 2 pairs of channels, falling geometrically from 1; float32.

    Raises:
        ValueError: dim is odd or too small.
    """
    least = 4 if closed else 2
    if dim < least or dim % 2:
        raise ValueError(f"positions: dim must be even and at least {least}, not {dim}")
    steps = torch.arange(dim // 2, dtype=torch.float32) / (dim // 2 - closed)
    return base**-steps


class RotaryPositions(nn.Module):
    """Rotate pairs of channels of queries and keys by angles that grow with the position.

    The product of a query and a key then depends on the distance of their positions. It has no parameters
    and no state: angles are computed in float32 at each call.

    Args:
        dim: Channels of a head that are rotated, the first ones; even. The others pass through.
        base: The slowest pair turns nearly that much slower than the first.
        interleaved: Channels 2i and 2i + 1 make a pair (RoFormer); otherwise i and i + dim / 2 (NeoX, Llama).

    Shape:
        x and the result `[B, N, ..., D]`, D at least dim: `[B, N, H, D]` or `[B, N, D]`; positions `[N]` or
        `[B, N]`.

    Raises:
        ValueError: dim is odd, or more than the channels.

    Source:
        Su et al. 2021 (arXiv 2104.09864).

    Example:
        >>> rotary = RotaryPositions(32)
        >>> q, k = torch.randn(2, 2, 100, 8, 64)
        >>> q, k = rotary(q), rotary(k)
    """

    def __init__(self, dim: int, *, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        frequencies(dim, base)
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys.

        Args:
            offset: Position of the first token, for streaming.
            positions: The tokens' positions, in place of 0, 1, 2, ... + offset.
        """
        if x.dim() < 3 or x.shape[-1] < self.dim:
            raise ValueError(
                f"RotaryPositions: x must be [B, N, ..., D] with D >= {self.dim}, not {list(x.shape)}"
            )
        if positions is None:
            positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        else:
            positions = positions + offset
        angles = positions.float()[..., None] * frequencies(self.dim, self.base).to(x.device)
        angles = angles.view(-1, x.shape[1], *(1,) * (x.dim() - 3), self.dim // 2)  # [1 or B, N, 1, dim / 2]
        return rotate(x, angles.cos(), angles.sin(), interleaved=self.interleaved)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the pairs of x's first channels by angles of which cosine and sine are given.

    Shape:
        x and the result `[..., D]`; cos, sin broadcast to `[..., dim / 2]`, dim at most D.
    """
    half = cos.shape[-1]
    part = x[..., : 2 * half]
    pairs = part.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def resize_position_embedding(
    embedding: Tensor,
    new_size: tuple[int, int],
    *,
    old_size: tuple[int, int] | None = None,
    extra: Sequence[int] = (),
    new_extra: Sequence[int] | None = None,
    antialias: bool = True,
) -> Tensor:
    """Interpolate an image's table of positions, bicubically, for another size.

    Args:
        embedding: The table, row by row of the image.
        new_size, old_size: Height and width in tokens; None means that the old image was square.
        extra: Rows of the table that belong to no place in the image, such as 0 for a class token in front,
            or 98 for Vim's in the middle. They are kept as they are.
        new_extra: Where these go in the result; None means to the same rows.
        antialias: Smooth where the image shrinks, as timm does.

    Shape:
        embedding `[..., N, dim]`; the result `[..., height * width + extra, dim]`.

    Raises:
        ValueError: The table does not have the old image's tokens, or rows do not fit.

    Example:
        >>> table = torch.randn(1, 197, 192)  # Vim-tiny, 14 x 14 and a class token in the middle
        >>> resize_position_embedding(table, (20, 20), extra=[98], new_extra=[200]).shape
        torch.Size([1, 401, 192])
    """
    rows = embedding.shape[-2]
    places = list(extra if new_extra is None else new_extra)
    total = new_size[0] * new_size[1] + len(extra)
    grid = [i for i in range(rows) if i not in set(extra)]
    side = round(len(grid) ** 0.5)
    height, width = (side, side) if old_size is None else old_size
    if height * width != len(grid) or rows - len(grid) != len(extra):
        raise ValueError(
            f"resize_position_embedding: {rows} rows are not {height} x {width} and {len(extra)} extra ones"
        )
    if len(set(places)) != len(extra) or not all(0 <= i < total for i in places):
        raise ValueError(f"resize_position_embedding: {places} are not {len(extra)} rows below {total}")
    table = embedding[..., grid, :].reshape(-1, height, width, embedding.shape[-1])
    table = table.permute(0, 3, 1, 2).float()  # [..., dim, height, width]
    if (height, width) != tuple(new_size):
        table = F.interpolate(table, size=new_size, mode="bicubic", antialias=antialias)
    out = embedding.new_empty(*embedding.shape[:-2], total, embedding.shape[-1])
    free = [i for i in range(total) if i not in set(places)]
    out[..., free, :] = table.flatten(2).transpose(1, 2).reshape(out[..., free, :].shape).to(out.dtype)
    out[..., places, :] = embedding[..., list(extra), :]
    return out
