"""Blocks of the score matrix on the CPU: shared out to threads, cut, and computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core import parallel

# Elements of a block of scores (2 MiB in float32): the fastest of 32 K to 6 M that were tried on two cores.
BLOCK = 512 * 1024
# Below this many scores, starting threads costs more than they save.
SMALL = 256 * 1024


class Group(NamedTuple):
    """Heads of one batch, or whole batches: what a block of the score matrix is taken from."""

    batch: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """View the share of `[B, H, ...]` as `[G, ...]` (a copy where that is broadcast over batches)."""
        return x[self.batch, self.heads].reshape(-1, *x.shape[2:])


class Part(NamedTuple):
    """What one thread works on: some batches, and some key heads with the query heads that share them."""

    number: int
    batch: slice
    heads: slice
    key_heads: slice

    def tokens(self, x: Tensor, keys: bool = False) -> Tensor:
        """The part of queries `[B, N, H, D]`, or of keys."""
        return x[self.batch, :, self.key_heads if keys else self.heads]

    def extra(self, x: Tensor | None) -> Tensor | None:
        """The part of what broadcasts to `[B, H, Nq, Nk]`, in four dimensions."""
        if x is None:
            return None
        x = x.view((1,) * (4 - x.dim()) + x.shape)
        batch = self.batch if x.shape[0] > 1 else slice(0, 1)
        return x[batch, self.heads if x.shape[1] > 1 else slice(0, 1)]


def cut(shape: tuple[int, int, int, int], key_heads: int) -> list[Part]:
    """Share the scores out by key heads, or by batches where these are more."""
    count = 1 if math.prod(shape) < SMALL else parallel.workers()
    batch, heads = shape[:2]
    group = heads // key_heads
    by_heads = key_heads >= min(count, batch)
    total = key_heads if by_heads else batch
    ends = [total * i // min(count, total) for i in range(min(count, total) + 1)]
    parts = []
    for number, (i, j) in enumerate(pairwise(ends)):
        if by_heads:
            parts.append(Part(number, slice(0, batch), slice(i * group, j * group), slice(i, j)))
        else:
            parts.append(Part(number, slice(i, j), slice(0, heads), slice(0, key_heads)))
    return parts


class Scores:
    """Recomputes blocks of the scores `scale * q k^T + bias`, hidden entries at -inf."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float
    ) -> None:
        self.batch, self.nq, self.heads, self.dim = q.shape
        self.nk, self.causal = k.shape[1], causal
        self.shape = (self.batch, self.heads, self.nq, self.nk)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = self.by_head(q, scale)  # [B, H, Nq, D]
        self.k = self.by_head(k)  # [B, H, Nk, D]
        self.bias = None if bias is None else bias.expand(self.shape)
        self.hidden = None if mask is None else (~mask).expand(self.shape)

    def by_head(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """View `[B, N, Hk, D]` as `[B, H, N, D]` in the dtype to accumulate in, key heads repeated."""
        x = x.transpose(1, 2).to(self.dtype)
        if x.shape[1] != self.heads:
            x = x.repeat_interleave(self.heads // x.shape[1], dim=1)
        return x if scale == 1.0 else torch.mul(x, scale, out=torch.empty(x.shape, dtype=self.dtype))

    def sizes(self) -> tuple[int, int, int]:
        """Batches, heads and rows of a block; several batches only with all heads, heads with all rows."""
        rows = min(self.nq, max(16, BLOCK // self.nk))
        heads = min(self.heads, max(1, BLOCK // (rows * self.nk))) if rows == self.nq else 1
        batch = min(self.batch, max(1, BLOCK // (heads * rows * self.nk))) if heads == self.heads else 1
        return batch, heads, rows

    def groups(self) -> Iterator[Group]:
        """Cut into groups, in a fixed order."""
        batch, heads, _ = self.sizes()
        for b in range(0, self.batch, batch):
            for h in range(0, self.heads, heads):
                yield Group(slice(b, min(b + batch, self.batch)), slice(h, min(h + heads, self.heads)))

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Cut a group into rows, in a fixed order, and the keys that they see if causal."""
        rows = self.sizes()[2]
        for r in range(0, self.nq, rows):
            end = min(r + rows, self.nq)
            keys = max(0, end + self.nk - self.nq) if self.causal else self.nk
            if keys:
                yield slice(r, end), slice(0, keys)

    def space(self, shape: Sequence[int]) -> Tensor:
        """Memory for a result: zeros where rows or keys may see nothing, and so are not visited."""
        return (torch.zeros if self.causal else torch.empty)(shape, dtype=self.dtype)

    def scratch(self, count: int) -> list[Tensor]:
        """Memory for blocks."""
        return [torch.empty(math.prod(self.sizes()) * self.nk, dtype=self.dtype) for _ in range(count)]

    def block(self, out: Tensor, q: Tensor, k: Tensor, extras: Extras, r: slice, c: slice) -> Tensor:
        """Write the scores of a block into `out` `[G, R, C]`, less `extras.minus` of each row."""
        minus = None if extras.minus is None else extras.minus[:, r]
        if extras.bias is None:
            torch.bmm(q, k.transpose(1, 2), out=out)
            if minus is not None:
                out.sub_(minus)
        else:
            # The bias is the product's initial value: one pass instead of two.
            if minus is None:
                out.copy_(extras.bias[:, r, c])
            else:
                torch.sub(extras.bias[:, r, c], minus, out=out)
            out.baddbmm_(q, k.transpose(1, 2))
        if extras.hidden is not None:
            out.masked_fill_(extras.hidden[:, r, c], -math.inf)
        if self.causal:
            first = r.start + self.nk - self.nq + 1
            out.masked_fill_(torch.ones(out.shape[1:], dtype=torch.bool).triu_(first), -math.inf)
        return out

    def extras(self, group: Group, minus: Tensor | None = None) -> Extras:
        """A group's share of the bias and the mask, and of what is taken from each row `[B, H, Nq, 1]`."""
        return Extras(*(None if x is None else group.of(x) for x in (self.bias, self.hidden, minus)))


class Extras(NamedTuple):
    """What goes into a group's scores besides the product."""

    bias: Tensor | None
    hidden: Tensor | None
    minus: Tensor | None


def shaped(space: Tensor, groups: int, r: slice, c: slice) -> Tensor:
    """A view `[G, R, C]` of scratch memory."""
    rows, keys = r.stop - r.start, c.stop
    return space[: groups * rows * keys].view(groups, rows, keys)
