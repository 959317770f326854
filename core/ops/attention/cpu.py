"""Attention on the CPU where torch has no fast path: a learned bias, the sigmoid kind, `post_scale`.

Rows of the score matrix are worked off in blocks that stay in the cache. The backward recomputes the weights
from the saved log-sum-exp, so no `[B, H, Nq, Nk]` tensor exists except the gradient of a bias of that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core import parallel

# Elements of a block of scores; two such float32 blocks (weights and their gradients) fit a core.
BLOCK = 192 * 1024
# Below this many scores, starting threads costs more than they save.
SMALL = 256 * 1024


class Chunk(NamedTuple):
    """A block of the score matrix: whole batches, heads of one, or rows of one head; and the keys seen."""

    batch: slice
    heads: slice
    rows: slice
    keys: slice


class Part(NamedTuple):
    """What one thread works on: batches and heads, and its scratch memory."""

    number: int
    batch: range
    heads: range
    space: list[Tensor]


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
        """Lay out `[B, N, Hk, D]` as contiguous `[B, H, N, D]` to accumulate in, key heads repeated."""
        x = x.transpose(1, 2).to(self.dtype)
        if x.shape[1] != self.heads:
            x = x.repeat_interleave(self.heads // x.shape[1], dim=1)
        return torch.mul(x, scale, out=torch.empty(x.shape, dtype=self.dtype))

    def parts(self) -> list[Part]:
        """Share the work out by heads, or by batches where these are more: parts write to no common place."""
        count = 1 if math.prod(self.shape) < SMALL else parallel.workers()
        by_heads = self.heads >= min(count, self.batch)
        total = self.heads if by_heads else self.batch
        cuts = [total * i // min(count, total) for i in range(min(count, total) + 1)]
        found = []
        for index, (start, end) in enumerate(pairwise(cuts)):
            batch = range(self.batch) if by_heads else range(start, end)
            heads = range(start, end) if by_heads else range(self.heads)
            size = math.prod(self._sizes(batch, heads)) * self.nk
            found.append(Part(index, batch, heads, [torch.empty(size, dtype=self.dtype) for _ in range(3)]))
        return found

    def _sizes(self, batches: range, heads: range) -> tuple[int, int, int]:
        """Batches, heads and rows of a block."""
        r = min(self.nq, max(16, BLOCK // self.nk))
        h = min(len(heads), max(1, BLOCK // (r * self.nk))) if r == self.nq else 1
        b = min(len(batches), max(1, BLOCK // (h * r * self.nk))) if h == self.heads else 1
        return b, h, r

    def chunks(self, part: Part) -> Iterator[Chunk]:
        """Cut a part into blocks, in a fixed order; a causal block stops at the last key it sees."""
        batch, heads, rows = self._sizes(part.batch, part.heads)
        for b in range(part.batch.start, part.batch.stop, batch):
            for h in range(part.heads.start, part.heads.stop, heads):
                for r in range(0, self.nq, rows):
                    end = min(r + rows, self.nq)
                    keys = max(0, end + self.nk - self.nq) if self.causal else self.nk
                    if keys:
                        yield Chunk(
                            slice(b, min(b + batch, part.batch.stop)),
                            slice(h, min(h + heads, part.heads.stop)),
                            slice(r, end),
                            slice(0, keys),
                        )

    def buffer(self, part: Part, chunk: Chunk, which: int) -> Tensor:
        """A block-shaped view of a part's scratch memory."""
        shape = [each.stop - each.start for each in chunk]
        return part.space[which][: math.prod(shape)].view(shape)

    def block(self, part: Part, chunk: Chunk, minus: Tensor | None = None) -> Tensor:
        """Scores of a block, less `minus` `[B, H, Nq, 1]`; in scratch memory 0."""
        out = self.buffer(part, chunk, 0)
        rows = None if minus is None else minus[chunk[:3]]
        if self.bias is None:
            torch.bmm(flat(self.q[chunk[:3]]), self._keys(chunk), out=flat(out))
            if rows is not None:
                out.sub_(rows)
        else:
            # The bias is the product's initial value: one pass instead of two.
            if rows is None:
                out.copy_(self.bias[chunk])
            else:
                torch.sub(self.bias[chunk], rows, out=out)
            flat(out).baddbmm_(flat(self.q[chunk[:3]]), self._keys(chunk))
        return self._hide(out, chunk)

    def _keys(self, chunk: Chunk) -> Tensor:
        return flat(self.k[chunk.batch, chunk.heads, chunk.keys]).transpose(1, 2)

    def _hide(self, out: Tensor, chunk: Chunk) -> Tensor:
        if self.hidden is not None:
            out.masked_fill_(self.hidden[chunk], -math.inf)
        if self.causal:
            first = chunk.rows.start + self.nk - self.nq + 1
            out.masked_fill_(torch.ones(out.shape[2:], dtype=torch.bool).triu_(first), -math.inf)
        return out


def flat(x: Tensor) -> Tensor:
    """View `[B, H, ...]` as `[B H, ...]`; a chunk has several batches only with all their heads."""
    return x.view(-1, *x.shape[2:])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    *,
    causal: bool,
    scale: float,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, Nq, H, D]` and, for the softmax kind, the rows' log-sum-exp `[B, H, Nq]`."""
    if not (sigmoid or causal) and mask is None and post_scale is None:
        return _flash(q, k, v, bias, scale)
    scores = Scores(q, k, bias, mask, causal, scale)
    value = scores.by_head(v)
    post = None if post_scale is None else post_scale.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    out = torch.zeros_like(scores.q)  # [B, H, Nq, D]; rows that see no key are never visited
    lse = scores.q.new_zeros(out.shape[:3])

    def work(part: Part) -> None:
        for chunk in scores.chunks(part):
            weights = scores.block(part, chunk)
            if sigmoid:
                weights.sub_(math.log(scores.nk)).sigmoid_()
            else:
                lse[chunk[:3]] = _normalise(weights)
            if post is not None:
                weights.mul_(post[chunk])
            seen = flat(value[chunk.batch, chunk.heads, chunk.keys])
            torch.bmm(flat(weights), seen, out=flat(out[chunk[:3]]))

    parallel.run([partial(work, part) for part in scores.parts()])
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def _normalise(scores: Tensor) -> Tensor:
    """Turn scores into softmax weights in place, zeros in a row without keys; return their log-sum-exp."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)  # no -inf minus -inf
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    scores.div_(total)
    return top.add_(total.log()).squeeze(-1)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's own CPU kernel, which reads a bias but has no gradient for it; it returns the log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    if bias is not None:
        bias = bias.to(q.dtype).expand(*(1,) * (4 - bias.dim()), *bias.shape)
    # The kernel takes a last stride of 1 for granted: with another it reads the wrong values.
    heads_first = (
        x.transpose(1, 2) if x.stride(-1) == 1 else x.transpose(1, 2).contiguous() for x in (q, k, v)
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, 0.0, False, attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.to(torch.promote_types(q.dtype, torch.float32))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    sigmoid: bool,
    needs_bias: bool,
    needs_post_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, and of bias and post_scale where needed; derivation in README.md."""
    scores = Scores(q, k, bias, mask, causal, scale)
    parts = scores.parts()
    value, grad_out = scores.by_head(v), scores.by_head(grad)
    delta = (grad.to(scores.dtype) * out).sum(-1).transpose(1, 2).unsqueeze(-1)  # [B, H, Nq, 1]
    rows = torch.full_like(delta, math.log(scores.nk)) if sigmoid else lse.unsqueeze(-1).to(scores.dtype)
    dq, dk, dv = (torch.zeros_like(x) for x in (scores.q, scores.k, value))
    post = None if post_scale is None else post_scale.expand(scores.shape)
    dbias = Reduced(bias, scores, parts) if needs_bias and bias is not None else None
    dpost = Reduced(post_scale, scores, parts) if needs_post_scale and post_scale is not None else None

    def work(part: Part) -> None:
        for chunk in scores.chunks(part):
            weights = scores.block(part, chunk, minus=rows)
            weights = weights.sigmoid_() if sigmoid else weights.exp_()
            seen = (chunk.batch, chunk.heads, chunk.keys)
            do = flat(grad_out[chunk[:3]])
            dw = scores.buffer(part, chunk, 1)
            torch.bmm(do, flat(value[seen]).transpose(1, 2), out=flat(dw))
            applied = weights
            if dpost is not None:
                dpost.add(part, chunk, torch.mul(weights, dw, out=scores.buffer(part, chunk, 2)))
            if post is not None:
                applied = torch.mul(weights, post[chunk], out=scores.buffer(part, chunk, 2))
                dw.mul_(post[chunk])
            flat(dv[seen]).baddbmm_(flat(applied).transpose(1, 2), do)
            if sigmoid:
                dw.addcmul_(dw, weights, value=-1)
            else:
                dw.sub_(delta[chunk[:3]])
            ds = torch.mul(weights, dw, out=dw if dbias is None else dbias.target(chunk, dw))
            if dbias is not None and ds is dw:
                dbias.add(part, chunk, ds)
            torch.bmm(flat(ds), flat(scores.k[seen]), out=flat(dq[chunk[:3]]))
            flat(dk[seen]).baddbmm_(flat(ds).transpose(1, 2), flat(scores.q[chunk[:3]]))

    parallel.run([partial(work, part) for part in parts])
    dq.mul_(scale)
    grads = (_by_token(dq, q), _by_token(dk, k), _by_token(dv, v))
    return *grads, None if dbias is None else dbias.result(), None if dpost is None else dpost.result()


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """Sum the heads of a group and lay out as `[B, N, Hk, D]` in the input's dtype."""
    grouped = x.unflatten(1, (like.shape[2], -1)).sum(2) if like.shape[2] != x.shape[1] else x
    return grouped.transpose(1, 2).to(like.dtype).contiguous()


class Reduced:
    """The gradient of a tensor that broadcasts over the scores: blocks are summed in a fixed order."""

    def __init__(self, like: Tensor, scores: Scores, parts: list[Part]) -> None:
        self.like = like
        shape = (1,) * (4 - like.dim()) + tuple(like.shape)
        self.broadcast = [i for i, n in enumerate(shape) if n == 1]
        self.full = shape == scores.shape
        # Without a broadcast, blocks are written where they belong; zeros are for what no block covers.
        make = torch.empty if self.full and not scores.causal else torch.zeros
        # Parts that would add to the same place get a sum of their own each.
        shared = len(parts) > 1 and shape[0 if parts[0].heads == range(scores.heads) else 1] == 1
        self.sums = [make(shape, dtype=scores.dtype) for _ in (parts if shared else parts[:1])]

    def target(self, chunk: Chunk, other: Tensor) -> Tensor:
        """Where to write a block's gradient: into the result itself if nothing is broadcast, else `other`."""
        return self.sums[0][chunk] if self.full else other

    def add(self, part: Part, chunk: Chunk, block: Tensor) -> None:
        """Add a block's gradient, summed over the dimensions that are broadcast."""
        where = tuple(slice(0, 1) if i in self.broadcast else each for i, each in enumerate(chunk))
        target = self.sums[part.number % len(self.sums)][where]
        if self.full:
            target.copy_(block)
        else:
            target.add_(block.sum(self.broadcast, keepdim=True) if self.broadcast else block)

    def result(self) -> Tensor:
        """The gradient in the shape and dtype of its tensor."""
        for each in self.sums[1:]:
            self.sums[0].add_(each)
        return self.sums[0].view(self.like.shape).to(self.like.dtype)
