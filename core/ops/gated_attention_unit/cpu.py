"""The gated attention unit on a CPU: group by group, so that what a group needs stays in the cache.

The two parts of the attention add up inside the matrix products, the gates are applied while their factors
are at hand, no frame is copied to fill up a group, and the groups are split between threads. README.md
derives the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core import parallel

# Rows of a group at a time in the forward pass: v, u and two results of 1,024 channels stay in the cache.
_ROWS = 128


class Inputs(NamedTuple):
    """What both passes read, in float32: `[B, S, K]` four times, `[B, S, E]` twice."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    v: Tensor
    u: Tensor


class Group(NamedTuple):
    """A row of the batch, a stretch of its frames, and which of the row's sums the stretch reads."""

    row: int
    frames: slice
    index: int


def forward(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and gate.

    Args:
        keep: Keep the attention's results for the backward pass.

    Returns:
        The result; att(v) and att(u), `[2, B, S, E]`, float32, or empty; the sums lin_k^T x that the linear
        part reads, `[B, 1 or G, 2, K, E]`, scaled.
    """
    x = _inputs(quad_q, quad_k, lin_q, lin_k, v, u, mask)
    groups = _groups(v, lengths, group_size, causal)
    sums = _sums(x, groups, lengths, group_size, causal)
    make = torch.empty if lengths is None else torch.zeros  # what lies behind a row's end stays zero
    out, kept = make(v.shape), make((2, *v.shape) if keep else (0,))

    def run(group: Group, scratch: Tensor) -> None:
        b, frames, index = group
        for first in range(frames.start, frames.stop, _ROWS):
            rows = slice(first, min(first + _ROWS, frames.stop))
            weights = _scores(x, b, rows, frames, mask, causal, group_size).square_()
            att_v, att_u = kept[:, b, rows] if keep else scratch[:, : rows.stop - rows.start]
            torch.mm(weights, x.v[b, frames], out=att_v).addmm_(x.lin_q[b, rows], sums[b, index, 0])
            torch.mm(weights, x.u[b, frames], out=att_u).addmm_(x.lin_q[b, rows], sums[b, index, 1])
            gated = torch.mul(att_v, x.u[b, rows], out=out[b, rows]).sigmoid_()
            gated.mul_(att_u).mul_(x.v[b, rows])

    size = 0 if keep else min(_ROWS, group_size)
    _each(groups, run, [torch.empty(2, size, v.shape[2]) for _ in range(parallel.workers())])
    return out.to(v.dtype), kept, sums


def backward(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
) -> list[Tensor]:
    """Pull the result's gradient back to the six inputs; in their order and dtype.

    Args:
        kept, sums: From `forward`.
    """
    x = _inputs(quad_q, quad_k, lin_q, lin_k, v, u, mask)
    dy = dy.float()
    groups = _groups(v, lengths, group_size, causal)
    make = torch.empty if lengths is None else torch.zeros
    grads = Inputs(*(make(t.shape) for t in x))
    # Each worker adds up its own share of the sums' gradients; where causal, each group has sums of its own.
    shares = [torch.zeros_like(sums) for _ in range(1 if causal else parallel.workers())]

    def within(group: Group, share: Tensor) -> None:
        b, frames, index = group
        v_, u_, lin_q_, dv, du = (t[b, frames] for t in (x.v, x.u, x.lin_q, grads.v, grads.u))
        d_v, d_u = _pull_gates(dy[b, frames], v_, u_, kept[0, b, frames], kept[1, b, frames], dv, du)
        root = _scores(x, b, frames, frames, mask, causal, group_size)
        weights = root.square()
        dv.addmm_(weights.t(), d_v)
        du.addmm_(weights.t(), d_u)
        pull = torch.mm(d_v, v_.t()).addmm_(d_u, u_.t()).mul_(root).mul_(2 / group_size)
        torch.mm(pull, x.quad_k[b, frames], out=grads.quad_q[b, frames])
        torch.mm(pull.t(), x.quad_q[b, frames], out=grads.quad_k[b, frames])
        sums_v, sums_u = sums[b, index]
        torch.mm(d_v, sums_v.t(), out=grads.lin_q[b, frames]).addmm_(d_u, sums_u.t())
        share[b, index, 0].addmm_(lin_q_.t(), d_v)
        share[b, index, 1].addmm_(lin_q_.t(), d_u)

    _each(groups, within, shares * (parallel.workers() if causal else 1))
    total = _scale(sum(shares[1:], shares[0]), lengths, v.shape[1], group_size, causal)
    if causal:
        total = total.flip(1).cumsum(1).flip(1) - total

    def across(group: Group, _: Tensor) -> None:
        b, frames, index = group
        total_v, total_u = total[b, index]
        dk = torch.mm(x.v[b, frames], total_v.t(), out=grads.lin_k[b, frames])
        dk.addmm_(x.u[b, frames], total_u.t())
        grads.v[b, frames].addmm_(x.lin_k[b, frames], total_v)
        grads.u[b, frames].addmm_(x.lin_k[b, frames], total_u)

    _each(groups, across, shares[:1] * parallel.workers())
    if mask is not None:
        grads.lin_k.masked_fill_(~mask[..., None], 0.0)
    return [g.to(v.dtype) for g in grads]


def _pull_gates(
    dy: Tensor, v: Tensor, u: Tensor, att_v: Tensor, att_u: Tensor, dv: Tensor, du: Tensor
) -> tuple[Tensor, Tensor]:
    """Pull back through the gates: to att(v) and att(u), returned, and to v and u as gates, written."""
    gate = torch.mul(att_v, u).sigmoid_()
    d_u = dy * gate
    torch.mul(d_u, att_u, out=dv)
    d_u.mul_(v)
    pull = torch.mul(dv, v)  # the gradient of the gate, times the gate
    pull.addcmul_(pull, gate, value=-1)
    torch.mul(pull, att_v, out=du)
    return pull.mul_(u), d_u


def _scores(
    x: Inputs, b: int, rows: slice, frames: slice, mask: Tensor | None, causal: bool, group_size: int
) -> Tensor:
    """The roots of the weights inside a group: relu of the scaled products, zero where none is seen."""
    root = torch.mm(x.quad_q[b, rows], x.quad_k[b, frames].t()).mul_(1 / group_size).relu_()
    if mask is not None:
        root.masked_fill_(~mask[b, frames], 0.0)
    return root.tril_(rows.start - frames.start) if causal else root


def _sums(x: Inputs, groups: list[Group], lengths: Tensor | None, group_size: int, causal: bool) -> Tensor:
    """lin_k^T v and lin_k^T u over all frames, or, where causal, over the groups before each."""
    batch, frames, dim = x.v.shape
    count = -(-frames // group_size) if causal else 1
    sums = torch.zeros(batch, count, 2, x.lin_k.shape[2], dim)

    def add(group: Group, _: Tensor) -> None:
        b, part, index = group
        torch.mm(x.lin_k[b, part].t(), x.v[b, part], out=sums[b, index, 0])
        torch.mm(x.lin_k[b, part].t(), x.u[b, part], out=sums[b, index, 1])

    whole = _groups(x.v, lengths, group_size if causal else max(frames, 1), causal)
    _each(whole, add, [sums] * parallel.workers())
    if causal:
        sums = sums.cumsum(1) - sums
    return _scale(sums, lengths, frames, group_size, causal)


def _scale(sums: Tensor, lengths: Tensor | None, frames: int, group_size: int, causal: bool) -> Tensor:
    if causal:
        return sums.div_(group_size)
    return sums.div_(frames if lengths is None else lengths.cpu().clamp(min=1)[:, None, None, None, None])


def _groups(v: Tensor, lengths: Tensor | None, size: int, causal: bool) -> list[Group]:
    """All groups of all rows; a row's last one ends with it."""
    batch, frames, _ = v.shape
    ends = [frames] * batch if lengths is None else lengths.tolist()
    return [
        Group(b, slice(first, min(first + size, end)), first // size if causal else 0)
        for b, end in enumerate(ends)
        for first in range(0, end, size)
    ]


def _each(groups: list[Group], work: Callable[[Group, Tensor], None], scratch: list[Tensor]) -> None:
    """Do the work of all groups, each worker with a tensor of its own."""
    count = len(scratch)

    def part(first: int) -> Callable[[], None]:
        def run() -> None:
            for group in groups[first::count]:
                work(group, scratch[first])

        return run

    parallel.run([part(first) for first in range(count)])


def _inputs(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, u: Tensor, mask: Tensor | None
) -> Inputs:
    lin_k = lin_k if mask is None else lin_k.masked_fill(~mask[..., None], 0.0)
    return Inputs(*(x.float() for x in (quad_q, quad_k, lin_q, lin_k, v, u)))
