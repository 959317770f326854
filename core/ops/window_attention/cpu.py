"""Window attention on a CPU: some windows at a time, gathered once and kept in the cache for all steps.

A part of the windows goes to each thread as a whole. Nothing of the size of the scores outlives its block:
the backward computes the weights again. The products are torch's batched ones; what lies between them is
here in torch, and in `numba.py` in compiled loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.window_attention.geometry import Geometry, layout

# Scores of a block: they fit a large second-level cache, and calls are few enough that threads seldom wait
# for each other between them (timed: 128 K to 2 M).
BLOCK = 512 * 1024
# Below this many scores, starting threads costs more than they save.
SMALL = 256 * 1024


class Block(NamedTuple):
    """Windows of one image, with all heads; or one window, with as many heads as the cache holds."""

    image: int
    windows: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """View the block's heads of its image, `[H, W, heads, D]`."""
        return x[self.image, :, :, self.heads]


class Steps(Protocol):
    """What happens between the products.

    Blocks of queries are `[windows, heads, n, D]`, of keys `[windows, heads, m, D]`, of scores `[windows,
    heads, n, m]`: m is the next multiple of `align`, and the keys from n on are zeros with weight zero.
    """

    align: int

    def take(self, images: Sequence[Tensor], block: Block, outs: Sequence[Tensor]) -> None:
        """Gather a block's tokens from each of some images `[B, H, W, heads, D]`."""

    def put(self, x: Tensor, block: Block, out: Tensor) -> None:
        """Write a block's tokens to their places in images."""

    def weights(self, q: Tensor, k: Tensor, block: Block, out: Tensor) -> None:
        """Compute the softmax weights of a block."""

    def gradient(self, weights: Tensor, grad: Tensor, dbias: Tensor) -> None:
        """Turn the weights' gradient into that of the products q k^T; add the scores' to dbias."""


class TorchSteps:
    """The steps in torch."""

    align = 1

    def __init__(self, where: Geometry, bias: Tensor | None, scale: float, shape: Sequence[int]) -> None:
        self.map, self.scale = layout(where), scale
        self.bias = torch.zeros(shape) if bias is None else bias.float()
        region = self.map.region[self.map.plain :]
        self.hidden = region[:, None, :, None] != region[:, None, None, :]  # [mixed windows, 1, n, n]
        self.may_be_dead = bool((self.bias == -math.inf).any())

    def take(self, images: Sequence[Tensor], block: Block, outs: Sequence[Tensor]) -> None:
        """As `Steps.take`."""
        for x, out in zip(images, outs, strict=True):
            take(x, block, self.map.places[block.windows], out)

    def put(self, x: Tensor, block: Block, out: Tensor) -> None:
        """As `Steps.put`."""
        put(x, block, self.map.places[block.windows], out)

    def weights(self, q: Tensor, k: Tensor, block: Block, out: Tensor) -> None:
        """As `Steps.weights`."""
        out.copy_(self.bias[block.heads])  # the product's initial value: one pass instead of two
        out.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=self.scale)
        start, plain = block.windows.start, self.map.plain
        if block.windows.stop > plain:
            mixed = slice(max(start, plain) - plain, block.windows.stop - plain)
            out[max(plain - start, 0) :].masked_fill_(self.hidden[mixed], -math.inf)
        dead = (out == -math.inf).all(-1, keepdim=True) if self.may_be_dead else None
        torch.softmax(out, -1, out=out)
        if dead is not None:
            out.masked_fill_(dead, 0.0)

    def gradient(self, weights: Tensor, grad: Tensor, dbias: Tensor) -> None:
        """As `Steps.gradient`."""
        torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)
        dbias.add_(grad.sum(0))
        grad.mul_(self.scale)


def take(x: Tensor, block: Block, places: Tensor, out: Tensor) -> None:
    """Gather the tokens at `places` `[windows, n]` into the first n of `out` `[windows, heads, m, D]`."""
    found = block.of(x).flatten(0, 1).index_select(0, places.flatten())  # [windows * n, heads, D]
    tokens = found.view(*places.shape, *found.shape[1:]).transpose(1, 2)
    out[:, :, : places.shape[1]].copy_(tokens)


def put(x: Tensor, block: Block, places: Tensor, out: Tensor) -> None:
    """Write the first n tokens of `[windows, heads, m, D]` to their places in the images `out`."""
    tokens = x[:, :, : places.shape[1]].transpose(1, 2).flatten(0, 1)  # [windows * n, heads, D]
    block.of(out).flatten(0, 1).index_copy_(0, places.flatten(), tokens.to(out.dtype))


MakeSteps = Callable[[Geometry, Tensor | None, float, Sequence[int]], Steps]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    where: Geometry,
    scale: float,
    make: MakeSteps = TorchSteps,
) -> Tensor:
    """Attend inside windows.

    Args:
        scale: Of the products.
        make: Makes the steps between the products, for scores `[heads, n, m]`.

    Shape:
        q, k, v and the result `[B, H, W, heads, D]`; bias `[heads, n, n]`.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    steps, shape = _prepare(make, q, bias, where, scale)

    def work(blocks: list[Block]) -> None:
        (query, found), (key, value), (weights,) = _scratch(blocks, shape, q.shape[4], 2, 2, 1)
        for block in blocks:
            qb, kb, vb, p, out_b = _first(block, query, key, value, weights, found)
            steps.take((q, k, v), block, (qb, kb, vb))
            steps.weights(qb, kb, block, p)
            _multiply(p, vb, out_b)
            steps.put(out_b, block, out)

    parallel.run([partial(work, part) for part in _share(q, where)])
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    where: Geometry,
    scale: float,
    make: MakeSteps = TorchSteps,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, and of the bias `[heads, n, n]` in float32."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    steps, shape = _prepare(make, q, bias, where, scale)
    parts = _share(q, where)
    shares = torch.zeros(len(parts), *shape)

    def work(blocks: list[Block], share: Tensor) -> None:
        queries, keys, scores = _scratch(blocks, shape, q.shape[4], 3, 3, 2)
        for block in blocks:
            qb, gb, dqb, kb, vb, dkb, p, ds = _first(block, *queries, *keys, *scores)
            steps.take((q, k, v), block, (qb, kb, vb))
            steps.take((grad,), block, (gb,))
            steps.weights(qb, kb, block, p)
            _multiply(p.transpose(2, 3), gb, dkb)
            steps.put(dkb, block, dv)
            _multiply(gb, vb.transpose(2, 3), ds)
            steps.gradient(p, ds, share[block.heads])
            _multiply(ds, kb, dqb)
            steps.put(dqb, block, dq)
            _multiply(ds.transpose(2, 3), qb, dkb)
            steps.put(dkb, block, dk)

    parallel.run([partial(work, part, share) for part, share in zip(parts, shares, strict=True)])
    return dq, dk, dv, shares.sum(0)[..., : shape[1]]


def _prepare(
    make: MakeSteps, q: Tensor, bias: Tensor | None, where: Geometry, scale: float
) -> tuple[Steps, tuple[int, int, int]]:
    """Make the steps, and the shape `[heads, n, m]` of a window's scores."""
    align = make.align  # type: ignore[attr-defined]
    shape = (q.shape[3], where.tokens, -(-where.tokens // align) * align)
    return make(where, bias, scale, shape), shape


def _scratch(
    blocks: list[Block], shape: tuple[int, int, int], dim: int, queries: int, keys: int, scores: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Memory for so many blocks of queries, of keys (with zeros for the padding) and of scores."""
    most, n, m = max(map(_windows, blocks)), shape[1], shape[2]
    heads = max(block.heads.stop - block.heads.start for block in blocks)
    make = torch.empty if n == m else torch.zeros
    return (
        [torch.empty(most, heads, n, dim) for _ in range(queries)],
        [make(most, heads, m, dim) for _ in range(keys)],
        [torch.empty(most, heads, n, m) for _ in range(scores)],
    )


def _windows(block: Block) -> int:
    return block.windows.stop - block.windows.start


def _first(block: Block, *spaces: Tensor) -> list[Tensor]:
    """As much of each scratch tensor as a block needs."""
    heads = block.heads.stop - block.heads.start
    return [x[: _windows(block), :heads] for x in spaces]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Matrix products, windows and heads as one batch."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def _share(q: Tensor, where: Geometry) -> list[list[Block]]:
    """Cut all windows into blocks, and share these out to the threads in order."""
    heads, scores = q.shape[3], where.tokens**2
    by_head = _cut(heads, BLOCK // scores)
    by_window = _cut(where.windows, BLOCK // (heads * scores))
    blocks = [Block(i, w, h) for i in range(q.shape[0]) for w in by_window for h in by_head]
    total = q.shape[0] * where.windows * heads * scores
    count = 1 if total < SMALL else min(parallel.workers(), len(blocks))
    return [blocks[len(blocks) * i // count : len(blocks) * (i + 1) // count] for i in range(count)]


def _cut(total: int, most: int) -> list[slice]:
    """Cut a range into pieces of about one size, at least 1 and at most `most`."""
    count = -(-total // max(1, most))
    return [slice(total * i // count, total * (i + 1) // count) for i in range(count)]
