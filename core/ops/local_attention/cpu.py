"""Local attention on the CPU: blocks of queries against their strips of keys, all of them views.

The forward is torch's fused kernel, whose batch are the blocks; what the global keys add is merged by the two
parts' log-sum-exps. The backward computes the weights again, a head at a time (README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.local_attention import short
from manyheads.core.ops.local_attention.pieces import Piece, Share, pieces


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
    if short.takes(q.shape[1], window):
        return _placed(short.forward(q, k, v, index, mask, window, scale), index, mask, top)
    out = torch.empty(q.shape, dtype=q.dtype)
    cut = pieces(q.shape[1], window, 0 if index is None else index.shape[1])
    hidden, _ = _hidden(q, index, mask)

    for batch, result in enumerate(out):
        share = Share.of(q, k, v, index, batch, scale)
        own = result if result.dtype == share.q.dtype else torch.empty(result.shape, dtype=share.q.dtype)
        _forward_of(share, cut, None if hidden is None else hidden[batch], own)
        if own is not result:
            result.copy_(own)
    return _placed(out, index, mask, top)


def _placed(out: Tensor, index: Tensor | None, mask: Tensor | None, top: Tensor | None) -> Tensor:
    """Put in place what needs no computing: zeros at masked tokens, the global tokens' rows."""
    if mask is not None:
        out.masked_fill_(~mask[..., None, None], 0.0)
    if index is not None and top is not None:
        batch, group = (index >= 0).nonzero(as_tuple=True)
        out[batch, index[batch, group]] = top[batch, group]
    return out


def _forward_of(share: Share, cut: list[Piece], hidden: Tensor | None, out: Tensor) -> None:
    """Write the rows `[N, H, D]` of one sequence and some heads, global tokens and masked ones not minded."""
    q, k, v = share.q, share.k, share.v
    lse = torch.empty(q.shape[1], q.shape[0], dtype=q.dtype)  # [H, N]
    for piece in cut:
        added = piece.added(hidden, q.dtype)[:, None]  # [C, 1, S, T]
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            piece.queries(q), piece.keys(k), piece.keys(v), 0.0, False, attn_mask=added, scale=share.scale
        )
        piece.queries(out).copy_(found)
        lse[:, piece.rows].unflatten(1, (piece.count, piece.size)).copy_(sums.transpose(0, 1))
    if share.k_far is None or share.v_far is None:
        return
    far = share.far_scores(q.transpose(0, 1))  # [H, N, G]
    total = torch.logaddexp(lse, far.logsumexp(-1)).unsqueeze(-1)
    by_head = out.transpose(0, 1)
    by_head.mul_(lse.unsqueeze(-1).sub_(total).exp_())
    by_head.baddbmm_(far.sub_(total).exp_(), share.v_far)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; rows of global tokens have none here."""
    hidden, dead = _hidden(q, index, mask)
    if index is not None:
        known = torch.zeros(q.shape[:2], dtype=torch.bool) if dead is None else dead.clone()
        dead = _mark(known, index)
    if short.takes(q.shape[1], window):
        return short.backward(grad, q, k, v, index, mask, dead, window, scale)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    cut = pieces(q.shape[1], window, 0 if index is None else index.shape[1])

    for batch in range(len(q)):
        share = Share.of(q, k, v, index, batch, scale)
        silent = None if dead is None else dead[batch]
        do = grad[batch].to(share.q.dtype)
        found = _backward_of(share, cut, None if hidden is None else hidden[batch], silent, do)
        for target, source in zip((dq, dk, dv), found, strict=True):
            target[batch].copy_(source.transpose(0, 1))
    return dq, dk, dv


def _backward_of(
    share: Share, cut: list[Piece], hidden: Tensor | None, dead: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients `[H, N, D]` of one sequence and some heads."""
    tokens, heads, dim = share.q.shape
    dq, dk, dv = (grad.new_zeros(heads, tokens, dim) for _ in range(3))
    dk_far, dv_far = (None if x is None else torch.zeros_like(x) for x in (share.k_far, share.v_far))
    for piece in cut:
        added = piece.added(hidden, grad.dtype)  # [C, S, T]
        silent = None if dead is None else piece.row_flags(dead)  # [C, S, 1]
        for which in piece.batches(heads):
            _backward_piece(share, piece, which, added, silent, grad, (dq, dk, dv), (dk_far, dv_far))
    dq.mul_(share.scale)
    dk.mul_(share.scale)
    if dk_far is not None and dv_far is not None and share.index is not None:
        used = share.index >= 0
        dk.index_add_(1, share.index[used], dk_far[:, used], alpha=share.scale)
        dv.index_add_(1, share.index[used], dv_far[:, used])
    return dq, dk, dv


def _backward_piece(
    share: Share,
    piece: Piece,
    which: int | None,
    added: Tensor,
    silent: Tensor | None,
    grad: Tensor,
    near: tuple[Tensor, Tensor, Tensor],
    far: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add the gradients of a piece, of all heads if it is one block, of head `which` if several."""
    query, do = (piece.row_batch(x.transpose(0, 1), which) for x in (share.q, grad))
    key, value = (piece.key_batch(x.transpose(0, 1), which) for x in (share.k, share.v))
    count, groups = len(query), 0 if share.k_far is None else share.k_far.shape[1]
    scores = query.new_empty(count, piece.size, groups + piece.strip)
    dw = torch.empty_like(scores)
    scores[..., groups:] = added
    scores[..., groups:].baddbmm_(query, key.transpose(1, 2), alpha=share.scale)
    dw[..., groups:] = torch.bmm(do, value.transpose(1, 2))
    if share.k_far is not None and share.v_far is not None:
        k_far, v_far = (
            x if which is None else x[which].expand(count, -1, -1) for x in (share.k_far, share.v_far)
        )
        scores[..., :groups] = share.far_scores(query, which)
        dw[..., :groups] = torch.bmm(do, v_far.transpose(1, 2))
    weights = torch.softmax(scores, -1)
    if silent is not None:
        weights.masked_fill_(silent, 0.0)
    dw.mul_(weights)
    ds = dw.addcmul_(weights, dw.sum(-1, keepdim=True), value=-1)
    dq, dk, dv = near
    piece.row_batch(dq, which).copy_(torch.bmm(ds[..., groups:], key))
    piece.add_strips(dk, which, torch.bmm(ds[..., groups:].transpose(1, 2), query))
    piece.add_strips(dv, which, torch.bmm(weights[..., groups:].transpose(1, 2), do))
    dk_far, dv_far = far
    if dk_far is None or dv_far is None:
        return
    piece.row_batch(dq, which).add_(torch.bmm(ds[..., :groups], k_far))
    for target, source, of in ((dk_far, ds, query), (dv_far, weights, do)):
        found = torch.bmm(source[..., :groups].transpose(1, 2), of)  # [C or H, G, D]
        if which is None:
            target.add_(found)
        else:
            target[which].add_(found.sum(0))


def _hidden(q: Tensor, index: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which keys `[B, N]` no band shows (masked, or global and so seen apart), and which rows are masked."""
    dead = None if mask is None else ~mask
    if index is None:
        return dead, dead
    hidden = torch.zeros(q.shape[:2], dtype=torch.bool) if dead is None else dead.clone()
    return _mark(hidden, index), dead


def _mark(flags: Tensor, index: Tensor) -> Tensor:
    """Set the flags `[B, N]` of the global tokens."""
    batch, group = (index >= 0).nonzero(as_tuple=True)
    flags[batch, index[batch, group]] = True
    return flags
