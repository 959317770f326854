"""How a band is cut on the CPU: blocks of queries and the strips of keys that they see, as views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`count` blocks of `size` rows from `row` on; block c sees the `strip` keys from `key + c * size` on."""

    row: int
    size: int
    count: int
    key: int
    strip: int
    window: int

    @property
    def rows(self) -> slice:
        """All rows of the piece."""
        return slice(self.row, self.row + self.size * self.count)

    def queries(self, x: Tensor) -> Tensor:
        """View `[N, H, D]` as blocks `[C, H, S, D]`."""
        return x[self.rows].unflatten(0, (self.count, self.size)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """View `[N, H, D]` as overlapping strips `[C, H, T, D]`."""
        token, head, one = x.stride()
        shape = (self.count, x.shape[1], self.strip, x.shape[2])
        return x[self.key :].as_strided(shape, (self.size * token, head, token, one))

    def batches(self, heads: int) -> Iterator[int | None]:
        """One product for all heads of a single block (None), one for each head of several."""
        yield from [None] if self.count == 1 else range(heads)

    def row_batch(self, x: Tensor, head: int | None) -> Tensor:
        """View `[H, N, D]` as `[H, S, D]`, or one head of it as `[C, S, D]`."""
        return x[:, self.rows] if head is None else x[head, self.rows].unflatten(0, (self.count, self.size))

    def key_batch(self, x: Tensor, head: int | None) -> Tensor:
        """View `[H, N, D]` as `[H, T, D]`, or one head of it as overlapping `[C, T, D]`."""
        if head is None:
            return x[:, self.key : self.key + self.strip]
        _, token, one = x.stride()
        shape = (self.count, self.strip, x.shape[2])
        return x[head, self.key :].as_strided(shape, (self.size * token, token, one))

    def add_strips(self, x: Tensor, head: int | None, strips: Tensor) -> None:
        """Add `[H, T, D]` to `[H, N, D]`, or to one head `[C, T, D]`, whose strips overlap: part by part."""
        if head is None:
            x[:, self.key : self.key + self.strip].add_(strips)
            return
        _, token, one = x.stride()
        for start in range(0, self.strip, self.size):
            part = strips[:, start : start + self.size]
            target = x[head, self.key + start :]
            target.as_strided(part.shape, (self.size * token, token, one)).add_(part)

    def added(self, hidden: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores `[C, S, T]`: -inf outside the band and at hidden keys `[N]`."""
        distance = self.key - self.row + torch.arange(self.strip) - torch.arange(self.size)[:, None]
        band = torch.zeros(self.size, self.strip, dtype=dtype)
        band.masked_fill_(distance.abs() > self.window, -math.inf)
        if hidden is not None:
            strips = hidden[self.key :].as_strided((self.count, 1, self.strip), (self.size, 1, 1))
            if strips.any():
                return torch.where(strips, -math.inf, band)
        return band.expand(self.count, -1, -1)

    def row_flags(self, flags: Tensor) -> Tensor:
        """A block's flags of rows, `[C, S, 1]`."""
        return flags[self.rows].view(self.count, self.size, 1)


def pieces(tokens: int, window: int, first: int = 0) -> list[Piece]:
    """Cut the band: a piece of full blocks, and single blocks before and after with shorter strips.

    The full blocks do not see the `first` keys: where only these are hidden, all add one matrix.
    """
    size = max(32, min(128, window // 2))
    found, row = [], 0
    while row < tokens:
        count = (tokens - window - row) // size
        if row >= window + first and count > 0:
            found.append(Piece(row, size, count, row - window, size + 2 * window, window))
            row += count * size
            continue
        rows = min(size, tokens - row)
        key = max(0, row - window)
        found.append(Piece(row, rows, 1, key, min(tokens, row + rows + window) - key, window))
        row += rows
    return found


@dataclass(frozen=True)
class Share:
    """What is worked on at a time: one sequence `[N, H, D]`, in the dtype to compute in.

    Attributes:
        k_far, v_far: The global tokens' keys and values `[H, G, D]`, zeros where there is none.
        index: The global tokens' places `[G]`, -1 where there is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_far: Tensor | None
    v_far: Tensor | None
    index: Tensor | None
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, batch: int, scale: float) -> Share:
        """Take the share; half precision is computed in float32."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (x[batch].to(dtype) for x in (q, k, v))
        # The fused kernel takes a last stride of 1 for granted.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if index is None:
            return cls(q, k, v, None, None, None, scale)
        own = index[batch]
        places, unused = own.clamp(min=0), (own < 0)[:, None]
        k_far, v_far = (x[places].transpose(0, 1).masked_fill(unused, 0.0) for x in (k, v))
        return cls(q, k, v, k_far, v_far, own, scale)

    def far_scores(self, query: Tensor, head: int | None = None) -> Tensor:
        """Scores of the global keys, `[H, S, G]` of queries `[H, S, D]`, or of one head's `[C, S, D]`."""
        assert self.k_far is not None and self.index is not None
        key = self.k_far if head is None else self.k_far[head].expand(len(query), -1, -1)
        found = torch.bmm(key, query.transpose(1, 2)).mul_(self.scale).transpose(1, 2)
        return found.masked_fill_(self.index < 0, -math.inf)
