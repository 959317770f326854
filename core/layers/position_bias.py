"""Biases of attention scores by relative position: ALiBi, T5's buckets, the tables of Swin and MaxViT.

Each module gives a bias `[heads, Nq, Nk]` for `manyheads.core.ops.attention` or `window_attention`. Where
there are more keys than queries, the last query is at the last key's position.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError, did_you_mean

Pair = tuple[int, int]
Order = Literal["swin", "maxvit"]
Method = Literal["bicubic", "geometric"]


def relative_positions(nq: int, nk: int, device: torch.device | None = None) -> Tensor:
    """Key position less query position, `[Nq, Nk]`; the last query is at the last key."""
    keys = torch.arange(nk, device=device)
    return keys - torch.arange(nk - nq, nk, device=device)[:, None]


class AlibiBias(nn.Module):
    """A penalty that grows linearly with the distance, at a slope of each head's own; nothing is learned.

    Bidirectional and causal attention alike: with a causal mask, distances into the future do not matter.

    Args:
        num_heads: Heads; any number.

    Shape:
        The result: `[num_heads, Nq, Nk]`.

    Source:
        Press et al. 2021 (arXiv 2108.12409); both directions as MosaicBERT, Portes et al. 2023 (arXiv
        2312.17482).

    Example:
        >>> AlibiBias(8)(100).shape
        torch.Size([8, 100, 100])
    """

    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)

    def forward(self, nq: int, nk: int | None = None) -> Tensor:
        """Return the bias; nk None means as many keys as queries."""
        distance = relative_positions(nq, nq if nk is None else nk, self.slopes.device).abs()
        return -self.slopes[:, None, None] * distance


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slopes, `[num_heads]` float32: a geometric sequence that ends at 2^-8.

    Between powers of two, the sequence of the power below, and every other one of the power above.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, not {num_heads}")
    below = 1 << (num_heads.bit_length() - 1)
    found = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
    found += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (num_heads - below) + 1, 2)]
    return torch.tensor(found)


class BucketBias(nn.Module):
    """A learned bias for each head and bucket of distances: exact nearby, wider and wider farther off (T5).

    The parameter is `relative_attention_bias.weight`, as T5's.

    Args:
        num_heads: Heads.
        num_buckets: Of both directions together, where there are two.
        max_distance: From here on all distances share the last bucket.
        bidirectional: Buckets for keys before and after the query; otherwise keys after it share bucket 0.

    Shape:
        The result: `[num_heads, Nq, Nk]`.

    Source:
        Raffel et al. 2019 (arXiv 1910.10683).

    Example:
        >>> BucketBias(8)(100).shape
        torch.Size([8, 100, 100])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        bucket_of(torch.zeros(1, dtype=torch.int64), num_buckets, max_distance, bidirectional)
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, nq: int, nk: int | None = None) -> Tensor:
        """Return the bias; nk None means as many keys as queries."""
        table = self.relative_attention_bias.weight
        relative = relative_positions(nq, nq if nk is None else nk, table.device)
        buckets = bucket_of(relative, self.num_buckets, self.max_distance, self.bidirectional)
        return table.t()[:, buckets]  # [heads, Nq, Nk]


def bucket_of(
    relative: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's bucket of each relative position (key less query), int64; arguments as `BucketBias`.

    Raises:
        ValueError: Too few buckets, or a max_distance that the exact buckets reach already.
    """
    each = num_buckets // 2 if bidirectional else num_buckets
    exact = each // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"bucket_of: {num_buckets} buckets up to distance {max_distance} leave no room for wide buckets"
        )
    first = torch.zeros_like(relative)
    if bidirectional:
        first = (relative > 0).long() * each
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    # float32 and this order of operations: at a bucket's edge the rounding decides, and it is T5's
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (steps * (each - exact)).long()).clamp(max=each - 1)
    return first + torch.where(distance < exact, distance, wide)


class RelativePositionBias(nn.Module):
    """A learned bias for each head and offset inside a window, looked up from a table.

    The parameter is `relative_position_bias_table`, in Swin's shape `[(2h - 1) * (2w - 1), heads]` and by
    query less key, or in MaxViT's `[heads, 2h - 1, 2w - 1]` and by key less query, so that the weights of
    either load as they are.

    Args:
        window: Height and width in tokens.
        num_heads: Heads.
        order: "swin" or "maxvit".

    Shape:
        The result: `[num_heads, n, n]`, n = h * w, tokens counted row by row.

    Raises:
        UsageError: No such order.

    Source:
        Liu et al. 2021 (Swin, arXiv 2103.14030); Tu et al. 2022 (MaxViT, arXiv 2204.01697).

    Example:
        >>> RelativePositionBias((7, 7), 3)().shape
        torch.Size([3, 49, 49])
    """

    relative_position_index: Tensor

    def __init__(self, window: Pair, num_heads: int, *, order: Order = "swin") -> None:
        super().__init__()
        _known("order", order, ("swin", "maxvit"))
        self.window, self.order = window, order
        height, width = (2 * n - 1 for n in window)
        shape = (height * width, num_heads) if order == "swin" else (num_heads, height, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", self._index(), persistent=False)

    def forward(self) -> Tensor:
        """Return the bias."""
        table = self.relative_position_bias_table
        by_head = table.t() if self.order == "swin" else table.flatten(1)  # [heads, offsets]
        return by_head[:, self.relative_position_index]

    @torch.no_grad()
    def resize(self, window: Pair, *, method: Method = "geometric") -> None:
        """Change to another window, with the table interpolated as `resize_relative_table` does."""
        table = self.relative_position_bias_table
        found = resize_relative_table(table, self.window, window, method=method)
        self.relative_position_bias_table = nn.Parameter(found, requires_grad=table.requires_grad)
        self.window = window
        self.relative_position_index = self._index().to(table.device)

    def _index(self) -> Tensor:
        index = relative_position_index(*self.window)
        return index if self.order == "swin" else index.t().contiguous()

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.window}, order={self.order}"


def relative_position_index(height: int, width: int) -> Tensor:
    """The row of Swin's table for each query and key of a window, `[n, n]` int64."""
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    down, right = (n[:, None] - n + size - 1 for n, size in ((y, height), (x, width)))
    return down * (2 * width - 1) + right


def resize_relative_table(
    table: Tensor, old_window: Pair, new_window: Pair, *, method: Method = "geometric"
) -> Tensor:
    """Interpolate a table of relative positions for another window.

    Args:
        table: Swin's `[(2h - 1) * (2w - 1), heads]`, or MaxViT's `[heads, 2h - 1, 2w - 1]`.
        method: "geometric": the old offsets are spread out to the new window's, far ones more than near
            ones, and linearly interpolated (BEiT, timm). "bicubic": stretched evenly (Swin's own code).

    Raises:
        UsageError: No such method.
        ValueError: The table is not that of the old window.

    Source:
        Bao et al. 2021 (BEiT, arXiv 2106.08254) for the geometric spacing.
    """
    _known("method", method, ("geometric", "bicubic"))
    old, new = (tuple(2 * n - 1 for n in w) for w in (old_window, new_window))
    flat = table.dim() == 2
    if (table.shape[0] != old[0] * old[1]) if flat else (tuple(table.shape[1:]) != old):
        raise ValueError(
            f"resize_relative_table: {list(table.shape)} is no table of a window {tuple(old_window)}"
        )
    if old == new:
        return table.clone()
    grid = (table.t().unflatten(1, old) if flat else table).float()  # [heads, 2h - 1, 2w - 1]
    if method == "bicubic":
        grid = F.interpolate(grid[None], size=new, mode="bicubic", align_corners=False)[0]
    else:
        rows, columns = (_spread(a, b).to(grid.device) for a, b in zip(old, new, strict=True))
        grid = rows @ grid @ columns.t()
    grid = grid.to(table.dtype)
    return grid.flatten(1).t().contiguous() if flat else grid


def _spread(old: int, new: int) -> Tensor:
    """Weights `[new, old]` that interpolate linearly between old offsets in geometric distances.

    The old ones lie at 0, 1, 1 + q, 1 + q + q^2, ... to both sides, with the q that takes the last to the
    new table's border; past it the border's value holds.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q ** (old // 2)) / (1 - q)
        low, high = (low, q) if reach > new // 2 else (q, high)
    steps = [0.0]
    for i in range(old // 2):
        steps.append(steps[-1] + q**i)
    points = torch.tensor([-s for s in steps[:0:-1]] + steps)
    wanted = torch.arange(new, dtype=torch.float32) - new // 2
    wanted = wanted.clamp(points[0].item(), points[-1].item())
    right = torch.bucketize(wanted, points).clamp(1, max(old - 1, 1))
    if old == 1:
        return torch.ones(new, 1)
    share = (wanted - points[right - 1]) / (points[right] - points[right - 1])
    ways = F.one_hot(right - 1, old) * (1 - share)[:, None] + F.one_hot(right, old) * share[:, None]
    return ways


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UsageError(f"no {what} {name!r}{did_you_mean(name, names)} (there are {', '.join(names)})")
