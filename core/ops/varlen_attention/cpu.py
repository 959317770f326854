"""Packed attention on the CPU: one sequence after another, several side by side.

The forward is torch's fused kernel, on views of the packed tensors; a bias by relative position is a view,
too. The backward computes the weights again, by blocks of rows that stay in the cache, and writes into the
packed gradients (README.md).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.varlen_attention.relative import Relative
from manyheads.core.ops.varlen_attention.sequences import Sequence, parts, sequences

# Elements of a block of scores in the backward (1 MiB in float32): three of them stay in a core's cache.
BLOCK = 256 * 1024


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return the output `[Tq, H, D]`."""
    found, whole = sequences(q, k, cu_q, cu_k, causal)
    out = _space(q, whole)
    dtype = torch.promote_types(q.dtype, torch.float32)
    relative = Relative.of(bias, found, causal, dtype)

    def work(part: list[Sequence]) -> None:
        for one in part:
            _forward_of(one, q, k, v, out, relative, dtype, scale)

    parallel.run([partial(work, part) for part in parts(found, q.shape[1])])
    return out


def _forward_of(
    one: Sequence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    relative: Relative | None,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """Write the output of a sequence. Heads that share a key head are the fused kernel's batch."""
    key_heads = k.shape[1]
    query = _by_group(one.queries(q), key_heads).to(dtype)  # [G, Hk, Nq, D]
    key, value = (one.keys(x).transpose(0, 1).to(dtype) for x in (k, v))  # [Hk, Nk, D]
    added, plain_causal = None, False
    if relative is not None:
        plain_causal = relative.plain and one.nq == one.nk  # the kernel's own mask, which skips blocks
        if not plain_causal:
            key, value = key.flip(1), value.flip(1)
            added = relative.matrix(one)
            added = added.unflatten(0, (key_heads if len(added) > 1 else 1, -1)).transpose(0, 1)
    # The kernel takes a last stride of 1 for granted.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    result, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key.expand(len(query), *key.shape),
        value.expand(len(query), *value.shape),
        0.0,
        plain_causal,
        attn_mask=added,
        scale=scale,
    )
    _by_group(one.queries(out), key_heads).copy_(result)


def _by_group(x: Tensor, key_heads: int) -> Tensor:
    """View `[N, H, D]` as `[G, Hk, N, D]`."""
    return x.unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of bias where needed."""
    found, whole = sequences(q, k, cu_q, cu_k, causal)
    dq, dk, dv = (_space(x, whole) for x in (q, k, v))
    dtype = torch.promote_types(q.dtype, torch.float32)
    relative = Relative.of(bias, found, causal, dtype)
    shares = parts(found, q.shape[1])
    wanted = needs_bias and relative is not None
    # A part has its own sum, and the sums are added in order: the same result whichever thread came first.
    sums = [torch.zeros_like(relative.values) if wanted and relative is not None else None for _ in shares]

    def work(part: list[Sequence], total: Tensor | None) -> None:
        for one in part:
            queries = (one.queries(grad), one.queries(q), one.queries(dq))
            _backward_of(one, queries, (k, v, dk, dv), relative, total, dtype, scale)

    parallel.run([partial(work, *pair) for pair in zip(shares, sums, strict=True)])
    if not needs_bias or bias is None:
        return dq, dk, dv, None
    if relative is None:  # no sequence at all
        return dq, dk, dv, torch.zeros_like(bias)
    total = torch.stack([x for x in sums if x is not None]).sum(0)
    return dq, dk, dv, relative.table_gradient(total, bias)


def _backward_of(
    one: Sequence,
    queries: tuple[Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor, Tensor, Tensor],
    relative: Relative | None,
    total: Tensor | None,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """Write a sequence's gradients into the last of `queries` and the last two of `keys`; add to `total`.

    With `relative`, keys are in reverse throughout.
    """
    (grad, q, dq), (k, v, dk, dv) = queries, (one.keys(x) for x in keys)
    heads = q.shape[1]
    grad, query = grad.transpose(0, 1).to(dtype), q.transpose(0, 1).to(dtype) * scale  # [H, Nq, D]
    key, value = (_repeated(x.to(dtype) if relative is None else x.to(dtype).flip(0), heads) for x in (k, v))
    gk, gv = torch.zeros_like(key), torch.zeros_like(value)
    step = min(one.nq, max(16, BLOCK // (heads * one.nk)))
    for start in range(0, one.nq, step):
        rows = min(step, one.nq - start)
        # Of keys in reverse the first are the ones that a causal block does not see.
        skip = 0 if relative is None or not relative.causal else max(0, one.nq - start - rows)
        do, qs, ks = grad[:, start : start + rows], query[:, start : start + rows], key[:, skip:]
        weights = _weights(one, relative, qs, ks, start, skip)
        dw = torch.bmm(do, value[:, skip:].transpose(1, 2)).mul_(weights)
        gv[:, skip:].baddbmm_(weights.transpose(1, 2), do)
        if total is None or relative is None:
            ds = dw.addcmul_(weights, dw.sum(-1, keepdim=True), value=-1)
        else:
            # Row r of the gradient begins r entries later: then a column is one distance.
            width = ks.shape[1] + rows - 1
            skewed = dw.new_zeros(heads, rows, width)
            ds = skewed.as_strided(dw.shape, (rows * width, width + 1, 1))
            torch.addcmul(dw, weights, dw.sum(-1, keepdim=True), value=-1, out=ds)
            first = relative.first(one, start) + skip
            total[:, first : first + width] += skewed.sum(1)
        gk[:, skip:].baddbmm_(ds.transpose(1, 2), qs)
        dq[start : start + rows].copy_(torch.bmm(ds, ks).mul_(scale).transpose(0, 1))
    for target, source in ((dk, gk), (dv, gv)):
        grouped = source.unflatten(0, (k.shape[1], -1)).sum(1)  # [Hk, Nk, D]
        target.copy_((grouped if relative is None else grouped.flip(1)).transpose(0, 1))


def _weights(
    one: Sequence, relative: Relative | None, query: Tensor, key: Tensor, start: int, skip: int
) -> Tensor:
    """The softmax weights of a block of rows, zero where a row sees no key."""
    if relative is None:
        return torch.softmax(torch.bmm(query, key.transpose(1, 2)), -1)
    added = relative.matrix(one, start, query.shape[1])[..., skip:].expand(len(query), -1, -1)
    scores = torch.baddbmm(added, query, key.transpose(1, 2))
    weights = torch.softmax(scores, -1)
    if relative.holes:
        weights.masked_fill_((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return weights


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Turn `[N, Hk, D]` into `[H, N, D]`, key heads repeated."""
    x = x.transpose(0, 1)
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)


def _space(like: Tensor, whole: bool) -> Tensor:
    """Memory for a result: zeros where rows may not be visited."""
    return (torch.empty if whole else torch.zeros)(like.shape, dtype=like.dtype)
