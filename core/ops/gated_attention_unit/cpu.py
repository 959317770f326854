"""The gated attention unit on a CPU: group by group, so that what a group needs stays in the cache.

v and u are the two halves of one projection: every product works on both at once. The two parts of the
attention add up inside the products, no frame is copied to fill up a group, and the groups are split between
threads. README.md derives the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.products import product


class Inputs(NamedTuple):
    """What both passes read, in float32: `[B, S, K]` four times, and v and u as `[B, S, 2 E]`."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    values: Tensor


class Group(NamedTuple):
    """A row of the batch, a stretch of its frames, and which of the row's sums the stretch reads."""

    row: int
    frames: slice
    part: int


class Options(NamedTuple):
    """Which frames count, and how; `gates` and `pull_gates` are this file's or the compiled ones."""

    mask: Tensor | None
    lengths: Tensor | None
    group_size: int
    causal: bool
    gates: Callable[[Tensor, Tensor, Tensor], None]
    pull_gates: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@torch.autocast("cpu", enabled=False)  # the products below are of float32, wherever the op is called
def forward(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and gate.

    Args:
        backend: "numba" applies the gates in a compiled loop, "cpu" in torch.
        keep: Keep the attention's results for the backward pass.

    Returns:
        The result; att(v) and att(u), `[B, S, 2 E]`, float32, or empty; the sums lin_k^T x that the linear
        part reads, `[B, 1 or G, K, 2 E]`, scaled.
    """
    x = _inputs(quad_q, quad_k, lin_q, lin_k, v, u, mask)
    how = _options(mask, lengths, group_size, causal, backend)
    sums = _sums(x, how)
    make = torch.empty if lengths is None else torch.zeros  # what lies behind a row's end stays zero
    batch, length, width = x.values.shape
    out, kept = make(batch, length, width // 2), make(x.values.shape if keep else (0,))

    def run(group: Group, _: int) -> None:
        b, frames, part = group
        weights = _scores(x, group, how).square_()
        if keep:
            attended = kept[b, frames]
            torch.mm(weights, x.values[b, frames], out=attended).addmm_(x.lin_q[b, frames], sums[b, part])
        else:
            attended = product(x.lin_q[b, frames], sums[b, part], product(weights, x.values[b, frames]))
        how.gates(attended, x.values[b, frames], out[b, frames])

    _each(_groups(v, lengths, group_size, causal), run, range(parallel.workers()))
    return out.to(v.dtype), kept, sums


@torch.autocast("cpu", enabled=False)
def backward(
    dy: Tensor,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    kept: Tensor,
    sums: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    group_size: int,
    causal: bool,
    backend: str,
) -> list[Tensor]:
    """Pull back to quad_q, quad_k, lin_q, lin_k, and v with u, `[B, S, 2 E]`; `kept, sums` from `forward`."""
    x = _inputs(quad_q, quad_k, lin_q, lin_k, v, u, mask)
    how = _options(mask, lengths, group_size, causal, backend)
    groups = _groups(v, lengths, group_size, causal)
    make = torch.empty if lengths is None else torch.zeros
    grads = Inputs(*(make(t.shape) for t in x))
    # Each worker adds up its own share of the sums' gradients; where causal, each group has sums of its own.
    count = parallel.workers()
    shares = [torch.zeros_like(sums) for _ in range(1 if causal else count)]
    scratch = [torch.empty(min(group_size, v.shape[1]), x.values.shape[2]) for _ in range(count)]
    turned = sums.transpose(2, 3).contiguous()  # a faster factor than a transposed view

    def within(group: Group, worker: int) -> None:
        b, frames, part = group
        values, dx = x.values[b, frames], grads.values[b, frames]
        pull = scratch[worker][: frames.stop - frames.start]
        how.pull_gates(dy[b, frames].float(), values, kept[b, frames], dx, pull)
        root = _scores(x, group, how)
        dx.addmm_(root.square().t(), pull)
        scores = torch.mm(pull, values.t()).mul_(root).mul_(2 / group_size)
        torch.mm(scores, x.quad_k[b, frames], out=grads.quad_q[b, frames])
        torch.mm(scores.t(), x.quad_q[b, frames], out=grads.quad_k[b, frames])
        torch.mm(pull, turned[b, part], out=grads.lin_q[b, frames])
        shares[worker % len(shares)][b, part].addmm_(x.lin_q[b, frames].t(), pull)

    _each(groups, within, range(count))
    total = _scale(sum(shares[1:], shares[0]), how, v.shape[1])
    if causal:
        total = _before(total.flip(1)).flip(1)
    turned_total = total.transpose(2, 3).contiguous()

    def across(group: Group, _: int) -> None:
        b, frames, part = group
        torch.mm(x.values[b, frames], turned_total[b, part], out=grads.lin_k[b, frames])
        grads.values[b, frames].addmm_(x.lin_k[b, frames], total[b, part])

    _each(groups, across, range(count))
    if mask is not None:
        grads.lin_k.masked_fill_(~mask[..., None], 0.0)
    return [g.to(v.dtype) for g in grads]


def gates(attended: Tensor, values: Tensor, out: Tensor) -> None:
    """Write att(u) * v * sigmoid(att(v) * u)."""
    (att_v, att_u), (v, u) = attended.chunk(2, 1), values.chunk(2, 1)
    torch.mul(att_v, u, out=out).sigmoid_().mul_(att_u).mul_(v)


def pull_gates(dy: Tensor, values: Tensor, attended: Tensor, dx: Tensor, pull: Tensor) -> None:
    """Pull back through the gates: to v and u as gates (dx), and to att(v) and att(u) (pull)."""
    (att_v, att_u), (v, u) = attended.chunk(2, 1), values.chunk(2, 1)
    (dv, du), (pull_v, pull_u) = dx.chunk(2, 1), pull.chunk(2, 1)
    gate = torch.mul(att_v, u).sigmoid_()
    torch.mul(dy, gate, out=pull_u)
    torch.mul(pull_u, att_u, out=dv)
    pull_u.mul_(v)
    torch.mul(dv, v, out=pull_v)
    pull_v.addcmul_(pull_v, gate, value=-1)  # the gradient of the gate, through its sigmoid
    torch.mul(pull_v, att_v, out=du)
    pull_v.mul_(u)


def _options(
    mask: Tensor | None, lengths: Tensor | None, group_size: int, causal: bool, backend: str
) -> Options:
    if backend == "cpu":
        return Options(mask, lengths, group_size, causal, gates, pull_gates)
    from manyheads.core.ops.gated_attention_unit import numba

    return Options(mask, lengths, group_size, causal, numba.gates, numba.pull_gates)


def _scores(x: Inputs, group: Group, how: Options) -> Tensor:
    """The roots of the weights inside a group: relu of the scaled products, zero where none is seen."""
    b, frames, _ = group
    root = product(x.quad_q[b, frames], x.quad_k[b, frames].t()).mul_(1 / how.group_size).relu_()
    if how.mask is not None:
        root.masked_fill_(~how.mask[b, frames], 0.0)
    return root.tril_() if how.causal else root


def _sums(x: Inputs, how: Options) -> Tensor:
    """lin_k^T x over all frames, or, where causal, over the groups before each."""
    batch, frames, dim = x.values.shape
    groups = _groups(x.values, how.lengths, how.group_size, how.causal)
    parts = -(-frames // how.group_size) if how.causal else 1
    count = 1 if how.causal else parallel.workers()
    shares = [torch.zeros(batch, parts, x.lin_k.shape[2], dim) for _ in range(count)]

    def add(group: Group, worker: int) -> None:
        b, stretch, part = group
        share = shares[worker % count][b, part]
        share.copy_(product(x.lin_k[b, stretch].t().contiguous(), x.values[b, stretch], share))

    _each(groups, add, range(parallel.workers()))
    sums = sum(shares[1:], shares[0])
    if how.causal:
        sums = _before(sums)
    return _scale(sums, how, frames)


def _before(sums: Tensor) -> Tensor:
    """The sum over the groups before each; not the running sum less its own, as one may dwarf the others."""
    return F.pad(sums[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)


def _scale(sums: Tensor, how: Options, frames: int) -> Tensor:
    if how.causal:
        return sums.div_(how.group_size)
    if how.lengths is None:
        return sums.div_(frames)
    return sums.div_(how.lengths.cpu().clamp(min=1)[:, None, None, None])


def _groups(v: Tensor, lengths: Tensor | None, size: int, causal: bool) -> list[Group]:
    """All groups of all rows; a row's last one ends with it."""
    batch, frames, _ = v.shape
    ends = [frames] * batch if lengths is None else lengths.tolist()
    return [
        Group(b, slice(first, min(first + size, end)), first // size if causal else 0)
        for b, end in enumerate(ends)
        for first in range(0, end, size)
    ]


def _each(groups: list[Group], work: Callable[[Group, Any], None], tools: Sequence[Any]) -> None:
    """Do the work of all groups, each worker with a tool of its own."""

    def part(first: int) -> Callable[[], None]:
        def run() -> None:
            for group in groups[first :: len(tools)]:
                work(group, tools[first])

        return run

    parallel.run([part(first) for first in range(len(tools))])


def _inputs(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    mask: Tensor | None,
) -> Inputs:
    lin_k = lin_k if mask is None else lin_k.masked_fill(~mask[..., None], 0.0)
    return Inputs(*(x.float() for x in (quad_q, quad_k, lin_q, lin_k, _joined(v, u))))


def _joined(v: Tensor, u: Tensor | None) -> Tensor:
    """v and u side by side: a view where they are the halves of one tensor, as a projection's chunks are."""
    if u is None:
        return v
    batch, frames, dim = v.shape
    beside = u.data_ptr() - v.data_ptr() == dim * v.element_size() and u.stride() == v.stride()
    if beside and v.stride(2) == 1 and u.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
        return v.as_strided((batch, frames, 2 * dim), v.stride())
    return torch.cat((v, u), 2)
