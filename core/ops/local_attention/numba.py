"""The forward in blocks of queries with all their heads: two products, and a compiled loop between them.

Nothing is copied: a block's queries and its strip of keys are views of what was given.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.local_attention import cpu
from manyheads.core.ops.local_attention.cpu import hidden_keys
from manyheads.core.ops.local_attention.numba_kernels import weigh
from manyheads.core.ops.local_attention.pieces import Share

# Rows of a block: fewer waste fewer scores, but products of 64 rows run faster than of 32.
ROWS = 64
# Scores of a block: they fit a large second-level cache.
SCORES = 512 * 1024


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    top: Tensor | None,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Return the output `[B, N, H, D]`; `top` are the rows of the global tokens."""
    if parallel.workers() == 1:  # nobody waits for a lock, and torch's fused kernel is the faster one
        return cpu.forward(q, k, v, index, mask, top, window=window, scale=scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    batch, tokens, heads, dim = q.shape
    strip = min(tokens, math.ceil((ROWS + 2 * window) / 32) * 32)  # keys of a block, in whole vectors
    some = max(1, SCORES // (ROWS * max(1, strip)))  # heads of a block
    shares = {
        (b, h): Share.of(q, k, v, index, b, slice(h, h + some), scale)
        for b in range(batch)
        for h in range(0, heads, some)
    }
    hidden, dead = hidden_keys(q, index, mask)
    places = torch.arange(tokens, dtype=torch.float32).repeat(batch, 1)
    if hidden is not None:
        places.masked_fill_(hidden, math.inf)

    def work(blocks: list[tuple[int, int, int]]) -> None:
        space = torch.empty(min(some, heads) * ROWS * strip), torch.empty(min(some, heads) * ROWS * dim)
        for b, h, row in blocks:
            key = max(0, min(row - window, tokens - strip))
            result = out[b, row : row + ROWS, h : h + some]
            _block(shares[b, h], places[b, key : key + strip], row, key, window, space, result)

    blocks = [(b, h, row) for b, h in shares for row in range(0, tokens, ROWS)]
    count = min(parallel.workers(), max(1, len(blocks)))
    ends = [len(blocks) * i // count for i in range(count + 1)]
    parallel.run([partial(work, blocks[ends[i] : ends[i + 1]]) for i in range(count)])
    if dead is not None:
        out.masked_fill_(dead[..., None, None], 0.0)
    if index is not None and top is not None:
        which, group = (index >= 0).nonzero(as_tuple=True)
        out[which, index[which, group]] = top[which, group]
    return out


def _block(
    share: Share,
    places: Tensor,
    row: int,
    key: int,
    window: int,
    space: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    """Write the rows `[S, H, D]` from `row` on, which see the keys `[T]` from `key` on."""
    size, heads, dim = out.shape
    strip = slice(key, key + len(places))
    query = share.q[row : row + size].transpose(0, 1)  # [H, S, D]
    scores = space[0][: heads * size * len(places)].view(heads, size, len(places))
    found = space[1][: heads * size * dim].view(heads, size, dim)
    total = torch.empty(heads, size)
    torch.bmm(query, share.k[strip].permute(1, 2, 0), out=scores)
    far, index = torch.empty(heads, size, 0), torch.empty(0, dtype=torch.int64)
    if share.k_far is not None and share.index is not None:
        far, index = torch.bmm(query, share.k_far.transpose(1, 2)), share.index.contiguous()
    arrays = [x.numpy() for x in (scores, far, places, index, total)]
    weigh(*arrays, row, key, window, np.float32(share.scale))  # type: ignore[call-arg]
    torch.bmm(scores, share.v[strip].transpose(0, 1), out=found)
    if share.v_far is not None:
        found.baddbmm_(far, share.v_far)
    torch.div(found.transpose(0, 1), total.t()[..., None], out=out)
