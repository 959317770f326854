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

# Elements of a block of scores; two such float32 blocks (weights and their gradients) fit it.
BLOCK = 192 * 1024
# Below this many scores, starting threads costs more than they save.
SMALL = 256 * 1024


class Group(NamedTuple):
    """Heads of one batch, or whole batches: what a block of the score matrix is taken from."""

    batch: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """View the share of `[B, H, ...]` as `[G, ...]` (what is broadcast over several batches is copied)."""
        return x[self.batch, self.heads].reshape(-1, *x.shape[2:])


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

    def groups(self, part: Part) -> Iterator[Group]:
        """Cut a part into groups, in a fixed order; a group has several batches only with all their heads."""
        batch, heads, _ = self._sizes(part.batch, part.heads)
        for b in range(part.batch.start, part.batch.stop, batch):
            for h in range(part.heads.start, part.heads.stop, heads):
                ends = min(b + batch, part.batch.stop), min(h + heads, part.heads.stop)
                yield Group(slice(b, ends[0]), slice(h, ends[1]))

    def blocks(self, part: Part) -> Iterator[tuple[slice, slice]]:
        """Cut a group's matrix into rows, in a fixed order, and the keys that they see if causal."""
        rows = self._sizes(part.batch, part.heads)[2]
        for r in range(0, self.nq, rows):
            end = min(r + rows, self.nq)
            keys = max(0, end + self.nk - self.nq) if self.causal else self.nk
            if keys:
                yield slice(r, end), slice(0, keys)

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
        for group in scores.groups(part):
            query, key, val, result, sums = (group.of(x) for x in (scores.q, scores.k, value, out, lse))
            extras, scale_after = scores.extras(group), None if post is None else group.of(post)
            for r, c in scores.blocks(part):
                weights = shaped(part.space[0], len(query), r, c)
                scores.block(weights, query[:, r], key[:, c], extras, r, c)
                if sigmoid:
                    weights.sub_(math.log(scores.nk)).sigmoid_()
                else:
                    sums[:, r] = _normalise(weights)
                if scale_after is not None:
                    weights.mul_(scale_after[:, r, c])
                torch.bmm(weights, val[:, c], out=result[:, r])

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
        for group in scores.groups(part):
            query, key, val, do = (group.of(x) for x in (scores.q, scores.k, value, grad_out))
            row_delta, gq, gk, gv = (group.of(x) for x in (delta, dq, dk, dv))
            extras, scale_after = scores.extras(group, rows), None if post is None else group.of(post)
            for r, c in scores.blocks(part):
                weights, dw, other = (shaped(space, len(query), r, c) for space in part.space)
                scores.block(weights, query[:, r], key[:, c], extras, r, c)
                applied = weights.sigmoid_() if sigmoid else weights.exp_()
                torch.bmm(do[:, r], val[:, c].transpose(1, 2), out=dw)
                if dpost is not None:
                    dpost.add(part, group, r, c, torch.mul(weights, dw, out=other))
                if scale_after is not None:
                    applied = torch.mul(weights, scale_after[:, r, c], out=other)
                    dw.mul_(scale_after[:, r, c])
                gv[:, c].baddbmm_(applied.transpose(1, 2), do[:, r])
                if sigmoid:
                    dw.addcmul_(dw, weights, value=-1)
                else:
                    dw.sub_(row_delta[:, r])
                ds = torch.mul(weights, dw, out=dw if dbias is None else dbias.target(group, r, c, dw))
                if dbias is not None and ds is dw:
                    dbias.add(part, group, r, c, ds)
                torch.bmm(ds, key[:, c], out=gq[:, r])
                gk[:, c].baddbmm_(ds.transpose(1, 2), query[:, r])

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

    def target(self, group: Group, r: slice, c: slice, other: Tensor) -> Tensor:
        """Where to write a block's gradient: into the result itself if nothing is broadcast, else `other`."""
        return group.of(self.sums[0])[:, r, c] if self.full else other

    def add(self, part: Part, group: Group, r: slice, c: slice, block: Tensor) -> None:
        """Add a block's gradient `[G, R, C]`, summed over the dimensions that are broadcast."""
        where = tuple(slice(0, 1) if i in self.broadcast else x for i, x in enumerate((*group, r, c)))
        target = self.sums[part.number % len(self.sums)][where]
        block = block.view(-1, group.heads.stop - group.heads.start, *block.shape[1:])  # [B, H, R, C]
        if self.full:
            target.copy_(block)
        else:
            target.add_(block.sum(self.broadcast, keepdim=True) if self.broadcast else block)

    def result(self) -> Tensor:
        """The gradient in the shape and dtype of its tensor."""
        for each in self.sums[1:]:
            self.sums[0].add_(each)
        return self.sums[0].view(self.like.shape).to(self.like.dtype)
