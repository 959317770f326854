"""ProbSparse attention on a CPU: torch's batched products, and compiled loops for what lies between them.

A few samples, or a few heads of one, go through all steps while they lie in the cache; such blocks are shared
between threads. README.md derives the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.prob_sparse_attention import cpu, numba_kernels

# Products of a block (2 MiB): most of them still lie in a core's second-level cache.
_BLOCK = 1 << 19
# Products of a head that are kept until its rows are chosen (16 MiB); a head of more goes strip by strip, and
# makes the chosen rows' products a second time.
_PRODUCTS = 1 << 22
# Products of a head that take about as long as a wait for Python's lock: beside other threads, fewer calls
# are worth a slower multiplication by the values.
_FEW = 1 << 14


class Block(NamedTuple):
    """Some samples with all heads, or one sample with some heads."""

    samples: slice
    heads: slice

    @property
    def width(self) -> int:
        """How many heads of a sample."""
        return self.heads.stop - self.heads.start

    @property
    def size(self) -> int:
        """How many matrices."""
        return (self.samples.stop - self.samples.start) * self.width

    def of(self, x: Tensor) -> Tensor:
        """The block's part of `[B, L, H, D]`, float32, the last axis dense: a view if it is so."""
        part = x[self.samples, :, self.heads]
        return part if part.dtype == torch.float32 and part.stride(3) == 1 else part.float().contiguous()

    def rows(self, x: Tensor) -> Tensor:
        """View the block's part of `[B, H, ...]`, `[n, ...]`."""
        return x[self.samples, self.heads].flatten(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, index_sample: Tensor | None, scale: float, causal: bool, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose, attend, fill the rest; as `cpu.forward`."""
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape)
    chosen = torch.empty(batch, heads, count, dtype=torch.int64)
    weights = torch.empty(batch, heads, count, k.shape[1])
    picks = None if index_sample is None else index_sample.int().contiguous().numpy().view(np.uint32)
    strip = max(1, min(length, _PRODUCTS // k.shape[1]))
    whole = parallel.workers() > 1 and length * k.shape[1] <= min(_FEW, _PRODUCTS)

    def work(blocks: Sequence[Block]) -> None:
        most = max(block.size for block in blocks)
        products, rows = torch.empty(most, strip, k.shape[1]), torch.empty(most, count, dim)
        for block in blocks:
            queries, keys, values = (block.of(x) for x in (q, k, v))
            best, p, found = block.rows(chosen), block.rows(weights), rows[: block.size]
            scores, where = _choose(queries, keys, picks, products[: block.size], best)
            here = (
                *_memory(values), k.shape[1], block.width, causal, best.numpy(), found.numpy(),
                block.samples.start, block.heads.start * dim, out.flatten(2).numpy(),
            )  # fmt: skip
            if whole:
                numba_kernels.finish(scores.numpy(), np.float32(scale), p.numpy(), *here)
                continue
            numba_kernels.softmax(
                scores.numpy(), where.numpy(), best.numpy(), np.float32(scale), causal, p.numpy()
            )
            _multiply(p, values, found)
            numba_kernels.fill(*here)

    _share(work, batch, heads, length * k.shape[1])
    return out.to(v.dtype), chosen, weights


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    weights: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the result's gradient back to q, k and v; as `cpu.backward`."""
    batch, length, heads, dim = q.shape
    count, width = weights.shape[2:]
    dq, dk, dv = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)

    def work(blocks: Sequence[Block]) -> None:
        most = max(block.size for block in blocks)
        scratch = [torch.empty(most, count, n) for n in (dim, dim, dim, width)]
        scratch += [torch.empty(most, width, dim) for _ in range(2)]
        for block in blocks:
            rows, picked, q_rows, pull, k_part, v_part = (x[: block.size] for x in scratch)
            grad, queries, keys, values = (block.of(x) for x in (dy, q, k, v))
            best, p = block.rows(chosen), block.rows(weights)
            numba_kernels.take(*_memory(grad), block.width, best.numpy(), rows.numpy())
            numba_kernels.take(*_memory(queries), block.width, best.numpy(), picked.numpy())
            _multiply(rows, values.transpose(1, 3), pull)
            numba_kernels.softmax_backward(p.numpy(), pull.numpy(), np.float32(scale))
            _multiply(pull, keys, q_rows)
            torch.bmm(pull.transpose(1, 2), picked, out=k_part)
            torch.bmm(p.transpose(1, 2), rows, out=v_part)
            numba_kernels.fill_backward(
                *_memory(grad), block.width, causal, best.numpy(), q_rows.numpy(), k_part.numpy(),
                v_part.numpy(), block.samples.start, block.heads.start * dim,
                *(x.flatten(2).numpy() for x in (dq, dk, dv)),
            )  # fmt: skip

    _share(work, batch, heads, length * width)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _choose(
    queries: Tensor, keys: Tensor, picks: np.ndarray | None, products: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the chosen queries; return products `[n, l, Lk]`, and which of their rows are those queries'.

    `products` is room for as many queries as are multiplied at once.
    """
    length, strip = queries.shape[1], products.shape[1]
    measures = torch.empty(len(products), length)
    if strip == length and picks is not None:
        _products(queries, keys, products)
        if not numba_kernels.rank(products.numpy(), picks, measures.numpy(), best.numpy()):
            best.copy_(measures.topk(best.shape[1], sorted=False).indices)
        return products, best
    for first in range(0, length, strip):
        part = slice(first, min(first + strip, length))
        found = products[:, : part.stop - first]  # dense: there is one head where there are several strips
        _products(queries[:, part], keys, found)
        if picks is None:
            measures[:, part] = cpu.stand_out(found, None)
        else:
            numba_kernels.measure(found.numpy(), picks[part], measures[:, part].numpy())
    if not numba_kernels.choose(measures.numpy(), best.numpy()):
        best.copy_(measures.topk(best.shape[1], sorted=False).indices)
    if strip == length:
        return products, best
    rows = torch.empty(*best.shape, queries.shape[3])
    numba_kernels.take(*_memory(queries), queries.shape[2], best.numpy(), rows.numpy())
    scores = torch.empty(*best.shape, keys.shape[1])
    _multiply(rows, keys.transpose(1, 3), scores)
    return scores, torch.arange(best.shape[1]).repeat(len(best), 1)


def _products(queries: Tensor, keys: Tensor, out: Tensor) -> None:
    """Multiply all queries `[g, l, h, D]` by all keys `[g, Lk, h, D]` into `[g * h, l, Lk]`."""
    x, y = queries.transpose(1, 2).unbind(), keys.permute(0, 2, 3, 1).unbind()
    for left, right, found in zip(x, y, out.chunk(len(x)), strict=True):
        torch.bmm(left, right, out=found)


def _multiply(rows: Tensor, x: Tensor, out: Tensor) -> None:
    """Multiply `[g * h, u, m]` by `[g, m, h, D]` into `[g * h, u, D]`."""
    y = x.transpose(1, 2).unbind()
    for left, right, found in zip(rows.chunk(len(y)), y, out.chunk(len(y)), strict=True):
        torch.bmm(left, right, out=found)


def _memory(x: Tensor) -> tuple[np.ndarray, int, int, int]:
    """All that the strides of `[g, L, h, D]` reach, as one row, and the strides of g, L and h."""
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    batch, position, head, _ = x.stride()
    return x.as_strided((length,), (1,)).numpy(), batch, position, head


def _share(work: Callable[[Sequence[Block]], None], batch: int, heads: int, products: int) -> None:
    """Cut samples, each with so many products a head, into blocks, and share them between threads."""
    workers = parallel.workers()
    most = max(1, _BLOCK // products)  # heads of a block
    if most >= heads:
        count = -(-batch // (most // heads))
        count = min(batch, -(-count // workers) * workers)  # as many blocks for each thread
        blocks = [Block(samples, slice(0, heads)) for samples in _parts(batch, count)]
    else:
        parts = _parts(heads, -(-heads // most))
        blocks = [Block(slice(b, b + 1), part) for b in range(batch) for part in parts]
    parallel.run([partial(work, found) for i in range(workers) if (found := blocks[i::workers])])


def _parts(length: int, count: int) -> list[slice]:
    """Cut a range into parts of about the same length."""
    return [slice(i * length // count, (i + 1) * length // count) for i in range(count)]
