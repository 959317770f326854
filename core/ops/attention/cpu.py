"""Attention on the CPU where torch has no fast path: a learned bias, the sigmoid kind, `post_scale`.

Rows of the score matrix are worked off in blocks of a few MiB. The weights of a small problem are kept
for the backward; of a large one they are recomputed from the saved log-sum-exp, and then no tensor of the
size of the scores exists but the gradient of a bias of that size.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.attention.cpu_blocks import Group, Part, Scores, cut, shaped


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
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output `[B, Nq, H, D]`, the log-sum-exp `[B, H, Nq]` (softmax only), the weights if kept."""
    if not (keep or sigmoid or causal) and mask is None and post_scale is None:
        return _flash(q, k, v, bias, scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    lse = torch.empty(shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    kept = torch.empty(shape if keep else 0, dtype=lse.dtype)

    def work(part: Part) -> None:
        inputs = (part.tokens(q), part.tokens(k, keys=True), part.tokens(v, keys=True))
        extras = (part.extra(bias), part.extra(mask), part.extra(post_scale))
        outputs = (part.tokens(out), lse[part.batch, part.heads])
        store = Sum(kept[part.batch, part.heads], full=True, causal=causal) if keep else None
        _forward_part(*inputs, *extras, *outputs, store, causal, scale, sigmoid)

    parallel.run([partial(work, part) for part in cut(shape, k.shape[2])])
    return out, lse, kept


def _forward_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    store: Sum | None,
    causal: bool,
    scale: float,
    sigmoid: bool,
) -> None:
    """Write `out` and `lse` of a part, and its weights into `store`."""
    scores = Scores(q, k, bias, mask, causal, scale)
    value = scores.by_head(v)
    post = None if post_scale is None else post_scale.expand(scores.shape)
    result = scores.space(scores.q.shape)
    sums = result.new_zeros(result.shape[:3])
    space, second = scores.scratch(2)
    for group in scores.groups():
        query, key, val, res, row_sums = (group.of(x) for x in (scores.q, scores.k, value, result, sums))
        extras, scale_after = scores.extras(group), None if post is None else group.of(post)
        for r, c in scores.blocks():
            block = scores.block(shaped(space, len(query), r, c), query[:, r], key[:, c], extras, r, c)
            weights = block
            if sigmoid:
                block.sub_(math.log(scores.nk)).sigmoid_()
            elif store is None:
                row_sums[:, r] = _normalise(block)
            else:
                other = shaped(second, len(query), r, c)
                weights = _softmax(block, store.target(group, r, c, other))
            if store is not None and (sigmoid or weights is other):
                store.add(group, r, c, weights)
            if scale_after is not None:
                weights = torch.mul(weights, scale_after[:, r, c], out=block)
            torch.bmm(weights, val[:, c], out=res[:, r])
    out.copy_(result.transpose(1, 2))
    lse.copy_(sums)


def _softmax(scores: Tensor, out: Tensor) -> Tensor:
    """Softmax from one block of memory into another; a row without keys gets zeros."""
    dead = None
    if (scores[..., 0] == -math.inf).any():  # a row without keys begins so: only then look at whole rows
        dead = (scores == -math.inf).all(-1, keepdim=True)
    torch.softmax(scores, -1, out=out)
    return out if dead is None else out.masked_fill_(dead, 0.0)


def _normalise(scores: Tensor) -> Tensor:
    """Turn scores into softmax weights in place, zeros in a row without keys; return their log-sum-exp."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)  # no -inf minus -inf
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    scores.div_(total)
    return top.add_(total.log()).squeeze(-1)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
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
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out.transpose(1, 2).contiguous(), lse.to(dtype), torch.empty(0, dtype=dtype)


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
    kept: Tensor | None = None,
    *,
    causal: bool,
    scale: float,
    sigmoid: bool,
    needs_bias: bool,
    needs_post_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, and of bias and post_scale where needed; derivation in README.md."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    parts = cut(shape, k.shape[2])
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    dbias = Reduced(bias, parts, shape[2:], dtype) if needs_bias and bias is not None else None
    dpost = (
        Reduced(post_scale, parts, shape[2:], dtype) if needs_post_scale and post_scale is not None else None
    )

    def work(part: Part) -> None:
        extras = [part.extra(x) for x in (bias, mask, post_scale)]
        sums = [None if x is None else x.of(part, causal) for x in (dbias, dpost)]
        queries = [part.tokens(x) for x in (grad, q, out, dq)]
        keys = [part.tokens(x, keys=True) for x in (k, v, dk, dv)]
        saved = lse[part.batch, part.heads], None if kept is None else kept[part.batch, part.heads]
        _backward_part(queries, keys, extras, sums, saved, causal, scale, sigmoid)

    parallel.run([partial(work, part) for part in parts])
    return dq, dk, dv, None if dbias is None else dbias.result(), None if dpost is None else dpost.result()


def _backward_part(
    queries: list[Tensor],
    keys: list[Tensor],
    extras: list[Tensor | None],
    sums: list[Sum | None],
    saved: tuple[Tensor, Tensor | None],
    causal: bool,
    scale: float,
    sigmoid: bool,
) -> None:
    """Write the gradients of a part into the last of `queries`, the last two of `keys`, and `sums`."""
    (grad, q, out, dq), (k, v, dk, dv), (bias, mask, post_scale), (dbias, dpost) = queries, keys, extras, sums
    lse, kept = saved
    scores = Scores(q, k, bias, mask, causal, scale)
    value, grad_out = scores.by_head(v), scores.by_head(grad)
    delta = rows = lse.unsqueeze(-1)  # [B, H, Nq, 1]
    if sigmoid:
        rows = torch.full_like(rows, math.log(scores.nk))
    elif kept is None:
        delta = (grad.to(scores.dtype) * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    # Keys' gradients are kept transposed: a large left operand that is transposed slows the product down.
    across = (*scores.shape[:2], scores.dim, scores.nk)
    grads = [scores.space(scores.q.shape), scores.space(across), scores.space(across)]
    post = None if post_scale is None else post_scale.expand(scores.shape)
    spaces = scores.scratch(3)
    for group in scores.groups():
        query, key, val, do = (group.of(x) for x in (scores.q, scores.k, value, grad_out))
        row_delta, gq, gk, gv = (group.of(x) for x in (delta, *grads))
        more, scale_after = scores.extras(group, rows), None if post is None else group.of(post)
        kept_weights = None if kept is None else group.of(kept)
        for r, c in scores.blocks():
            weights, dw, other = (shaped(space, len(query), r, c) for space in spaces)
            if kept_weights is None:
                scores.block(weights, query[:, r], key[:, c], more, r, c)
                weights = weights.sigmoid_() if sigmoid else weights.exp_()
            else:
                weights = kept_weights[:, r, c]
            applied = weights
            torch.bmm(do[:, r], val[:, c].transpose(1, 2), out=dw)
            if dpost is not None:
                dpost.add(group, r, c, torch.mul(weights, dw, out=other))
            if scale_after is not None:
                applied = torch.mul(weights, scale_after[:, r, c], out=other)
                dw.mul_(scale_after[:, r, c])
            first = 1 if causal or r.start else 0  # the first block need not find zeros
            gv[..., c].baddbmm_(do[:, r].transpose(1, 2), applied, beta=first)
            ds = other if dbias is None else dbias.target(group, r, c, other)
            _score_gradient(weights, dw, None if kept is not None else row_delta[:, r], sigmoid, ds)
            if dbias is not None and ds is other:
                dbias.add(group, r, c, ds)
            torch.bmm(ds, key[:, c], out=gq[:, r])
            gk[..., c].baddbmm_(query[:, r].transpose(1, 2), ds, beta=first)
    grads[0].mul_(scale)
    for x, found in zip((dq, dk, dv), (grads[0], *(g.transpose(2, 3) for g in grads[1:])), strict=True):
        grouped = found if x.shape[2] == scores.heads else found.unflatten(1, (x.shape[2], -1)).sum(2)
        x.copy_(grouped.transpose(1, 2))


def _score_gradient(weights: Tensor, dw: Tensor, delta: Tensor | None, sigmoid: bool, out: Tensor) -> None:
    """Write the gradient of a block's scores from that of its weights, `dw`, which is used up."""
    if sigmoid:
        torch.mul(weights, dw.addcmul_(dw, weights, value=-1), out=out)
    elif delta is not None:
        torch.mul(weights, dw.sub_(delta), out=out)
    else:  # whole rows of kept weights: torch sums them itself
        torch.ops.aten._softmax_backward_data.out(dw, weights, -1, dw.dtype, grad_input=out)


class Sum:
    """A part's share of the gradient of a bias or scale: blocks are added, or written, in a fixed order."""

    def __init__(self, grad: Tensor, full: bool, causal: bool) -> None:
        self.grad, self.full = grad, full
        self.broadcast = [i for i, n in enumerate(grad.shape) if n == 1]
        if causal or not full:  # otherwise every place is written once
            grad.zero_()

    def target(self, group: Group, r: slice, c: slice, other: Tensor) -> Tensor:
        """Where to write a block's gradient: into the result itself if it is one block there, or `other`."""
        if self.full and group.batch.stop - group.batch.start == 1:
            return self.grad[group.batch.start, group.heads, r, c]
        return other

    def add(self, group: Group, r: slice, c: slice, block: Tensor) -> None:
        """Add a block's gradient `[G, R, C]`, summed over the dimensions that are broadcast."""
        where = tuple(slice(0, 1) if i in self.broadcast else x for i, x in enumerate((*group, r, c)))
        block = block.view(-1, group.heads.stop - group.heads.start, *block.shape[1:])  # [B, H, R, C]
        if self.full:
            self.grad[where].copy_(block)
        else:
            self.grad[where].add_(block.sum(self.broadcast, keepdim=True))


class Reduced:
    """The gradient of a tensor that broadcasts over the scores; parts that share a place get a sum each."""

    def __init__(self, like: Tensor, parts: list[Part], lengths: tuple[int, int], dtype: torch.dtype) -> None:
        self.like, self.lengths = like, lengths
        shape = (1,) * (4 - like.dim()) + tuple(like.shape)
        together = [all(getattr(p, d) == getattr(parts[0], d) for p in parts) for d in ("batch", "heads")]
        shared = any(n == 1 and not same for n, same in zip(shape[:2], together, strict=True))
        self.sums = [torch.empty(shape, dtype=dtype) for _ in (parts if shared else parts[:1])]

    def of(self, part: Part, causal: bool) -> Sum:
        """A part's share."""
        share = part.extra(self.sums[part.number % len(self.sums)])
        assert share is not None
        own = (part.batch.stop - part.batch.start, part.heads.stop - part.heads.start, *self.lengths)
        return Sum(share, share.shape == own, causal)

    def result(self) -> Tensor:
        """The gradient in the shape and dtype of its tensor."""
        for each in self.sums[1:]:
            self.sums[0].add_(each)
        return self.sums[0].view(self.like.shape).to(self.like.dtype)
