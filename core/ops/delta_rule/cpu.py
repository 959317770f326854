"""The delta rule on a CPU: chunks, as matrix products in torch, with the backward written out (README.md).

Kept for the backward are the inputs and the state before each chunk. What happens inside the chunks is
computed for all of them at once, a head at a time; the state goes from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.ops.delta_rule.chunks import Layout, layout
from manyheads.core.parallel import run

SIZE = 32
_LEAST = -1e4  # exp of less is zero, and float64 holds sums of it exactly enough
_NARROW = 16  # keys below which a chunk's keys are so dependent that its system is solved in float64


class Inside(NamedTuple):
    """What happens inside each chunk.

    Attributes:
        decay: What is left at step t of step s's product, zero for s > t, `[N, H, C, C]`.
        since, until: What is left at step t of the state before the chunk; at its end, of step t's product,
            `[N, H, C, 1]`.
        whole: What is left after the chunk of the state before it, `[N, H, 1, 1]`.
        products: Of keys with keys, `[N, H, C, C]`.
        system: The strict lower triangle that couples the steps, `[N, H, C, C]`.
        writes, reads: Solutions: what the steps write, were the state zero, `[N, H, C, V]`, and what they
            read of the state, `[N, H, C, K]`.
        scores: Of the queries with the keys, scaled and decayed, `[N, H, C, C]`.
        queries: Scaled and decayed since the chunk's beginning, `[N, H, C, K]`.
        keys: Decayed until its end, `[N, H, C, K]`.
    """

    decay: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor
    products: Tensor
    system: Tensor
    writes: Tensor
    reads: Tensor
    scores: Tensor
    queries: Tensor
    keys: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences.

    Args:
        keep: Return the states before the chunks, for the backward.

    Shape:
        q, k: `[B, L, H, K]`; v: `[B, L, H, V]`; beta, log_decay: `[B, L, H]`; states: `[S, H, K, V]`.

    Returns:
        The outputs in v's dtype, the last states, and (or nothing) the states before each chunk
        `[rows, H, K, V]`.
    """
    cut = layout(q.shape[0], q.shape[1], cu_seqlens, SIZE)
    shape = q.shape[2], q.shape[3], v.shape[3]
    out, state = (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty(cut.sequences, *shape),
    )
    kept = torch.empty(rows(q, cu_seqlens) if keep else 0, *shape)
    kept[cut.chunks :] = 0  # rows without a chunk

    def head(h: slice) -> None:
        chunks = _chunks(cut, _of(h, q, k, v, beta, log_decay))
        initial = None if initial_state is None else initial_state[:, h]
        found, last = _scan(cut, _inside(*chunks, scale), initial, kept[:, h])
        out[:, :, h], state[:, h] = cut.join(found, v[:, :, h]), last

    _each_head(head, shape[0])
    return out, state, kept


def _scan(cut: Layout, inside: Inside, initial_state: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in chunks and last states of a head; states before the chunks go to kept, if it has rows."""
    state = _start(cut, inside, initial_state)
    out = torch.empty_like(inside.writes)
    for chunk, sequence in cut.places:
        before = state[sequence]
        if kept.shape[0]:
            kept[chunk] = before
        written = inside.writes[chunk] - inside.reads[chunk] @ before
        out[chunk] = inside.queries[chunk] @ before + inside.scores[chunk] @ written
        state[sequence] = inside.whole[chunk] * before + inside.keys[chunk].mT @ written
    return out, cut.unsort(state).float()


def _each_head(head: Callable[[slice], None], count: int) -> None:
    """One head after the other on each thread: what a head needs inside its chunks stays near the core."""
    run([partial(head, slice(h, h + 1)) for h in range(count)])


def _of(h: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x[:, :, h] for x in tensors]


def backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state (float32)."""
    cut = layout(q.shape[0], q.shape[1], cu_seqlens, SIZE)
    given = [q, k, v, beta] if log_decay is None else [q, k, v, beta, log_decay]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
    dinitial = torch.empty(cut.sequences, *kept.shape[1:])

    def head(h: slice) -> None:
        chunks = _chunks(cut, _of(h, q, k, v, beta, log_decay))
        inside = _inside(*chunks, scale)
        pulled = cut.split(dout[:, :, h], chunks[0].dtype)
        after = _start(cut, inside, None if dstate is None else dstate[:, h])
        before = kept[: cut.chunks, h].to(chunks[0].dtype)
        grads = _pull_back(cut, chunks, inside, pulled, after, before, scale)
        for x, grad in zip(found, grads, strict=False):
            x[:, :, h] = cut.join(grad, x[:, :, h])
        dinitial[:, h] = cut.unsort(after).float()

    _each_head(head, q.shape[2])
    dq, dk, dv, dbeta, *rest = found
    return dq, dk, dv, dbeta, rest[0] if rest else None, dinitial


def _pull_back(
    cut: Layout,
    chunks: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    inside: Inside,
    dout: Tensor,
    dstate: Tensor,
    before: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a head's inputs in chunks; dstate, of the last states, becomes that of the first ones."""
    dwritten, dkeys = torch.empty_like(inside.writes), torch.empty_like(inside.keys)
    dwhole = torch.empty_like(inside.whole)
    written = inside.writes - inside.reads @ before
    for chunk, sequence in reversed(cut.places):
        after = dstate[sequence]
        pulled = inside.scores[chunk].mT @ dout[chunk] + inside.keys[chunk] @ after
        dwritten[chunk] = pulled
        dkeys[chunk] = written[chunk] @ after.mT
        dwhole[chunk] = (after * before[chunk]).sum((-2, -1), keepdim=True)
        read = inside.queries[chunk].mT @ dout[chunk] - inside.reads[chunk].mT @ pulled
        dstate[sequence] = inside.whole[chunk] * after + read
    dscores = (dout @ written.mT).tril_()
    solved = torch.cat([dwritten, -(dwritten @ before.mT)], -1)
    return _pull_inside(chunks, inside, scale, dscores, dout @ before.mT, dkeys, dwhole, solved)


def rows(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of the kept states: at least as many as there are chunks, without a look at cu_seqlens' values."""
    batch, length = q.shape[:2]
    if cu_seqlens is not None:
        return length // SIZE + cu_seqlens.shape[0] - 1
    return batch * -(-length // SIZE)


def _chunks(cut: Layout, given: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All inputs in chunks, `[N, H, C, ...]`; beta `[N, H, C, 1]`, log_decay zeros where there is none."""
    q, k, v, beta, log_decay = given
    assert q is not None and k is not None and v is not None and beta is not None
    dtype = torch.float64 if q.shape[3] < _NARROW else torch.float32
    queries, keys, values, rates = (cut.split(x, dtype) for x in (q, k, v, beta))
    decays = torch.zeros_like(rates) if log_decay is None else cut.split(log_decay, torch.float64)
    return queries, keys, values, rates[..., None], decays


def _start(cut: Layout, inside: Inside, state: Tensor | None) -> Tensor:
    """A head's states, in the order of the layout, to be written over."""
    if state is None:
        keys, values = inside.keys.shape[-1], inside.writes.shape[-1]
        return inside.keys.new_zeros(cut.sequences, inside.keys.shape[1], keys, values)
    return cut.sort(state.to(inside.keys.dtype, copy=True))


def _inside(
    queries: Tensor, keys: Tensor, values: Tensor, rates: Tensor, decays: Tensor, scale: float
) -> Inside:
    # float64: the difference of two float32 sums would carry the rounding of both.
    total = decays.double().clamp(min=_LEAST).cumsum(-1)  # [N, H, C]
    decay = (total[..., :, None] - total[..., None, :]).to(keys.dtype).exp_().tril_()
    since, whole = total.exp().to(keys.dtype)[..., None], total[..., -1:]
    until = (whole - total).exp_().to(keys.dtype)[..., None]
    products = keys @ keys.mT
    system = (rates * decay * products).tril_(-1)
    known = torch.cat([rates * values, rates * since * keys], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    writes, reads = solved.split([values.shape[-1], keys.shape[-1]], -1)
    scores = (queries @ keys.mT).mul_(decay).mul_(scale).tril_()
    return Inside(
        decay,
        since,
        until,
        whole.exp().to(keys.dtype)[..., None],
        products,
        system,
        writes,
        reads,
        scores,
        queries * (since * scale),
        keys * until,
    )


def _pull_inside(
    chunks: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    inside: Inside,
    scale: float,
    dscores: Tensor,
    dqueries: Tensor,
    dkeys: Tensor,
    dwhole: Tensor,
    solved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of what happens inside the chunks to those of their inputs."""
    queries, keys, values, rates, _ = chunks
    known = torch.linalg.solve_triangular(inside.system.mT, solved, upper=True, unitriangular=True)
    dwrites, dreads = known.split([values.shape[-1], keys.shape[-1]], -1)
    dsystem = (dwrites @ inside.writes.mT + dreads @ inside.reads.mT).neg_().tril_(-1)
    pairs = dscores * inside.scores + dsystem * inside.system  # of the logarithm of each pair's decay
    dscores = dscores.mul_(inside.decay).mul_(scale)
    coupled = dsystem.mul_(inside.decay)
    drates = (coupled * inside.products).sum(-1, keepdim=True) + (dwrites * values).sum(-1, keepdim=True)
    read = dreads * keys
    drates += inside.since * read.sum(-1, keepdim=True)
    coupled = coupled.mul_(rates)
    dq = dscores @ keys + dqueries * (inside.since * scale)
    dk = dscores.mT @ queries + coupled @ keys + coupled.mT @ keys
    dk += dreads * (rates * inside.since) + dkeys * inside.until
    ahead = (dkeys * keys).sum(-1) * inside.until[..., 0]  # [N, H, C]
    behind = ((dqueries * queries).sum(-1) * scale + read.sum(-1) * rates[..., 0]) * inside.since[..., 0]
    # A step's log-decay is in every span that crosses it: sums of those alone, no differences of long sums.
    across = pairs.flip(-2).cumsum(-2).flip(-2).tril_(-1).sum(-1)
    ddecay = across + behind.flip(-1).cumsum(-1).flip(-1) + (ahead.cumsum(-1) - ahead)
    ddecay += (dwhole * inside.whole)[..., 0]
    return dq, dk, rates * dwrites, drates[..., 0], ddecay
