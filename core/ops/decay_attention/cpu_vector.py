"""Chunked linear attention with a decay for each key channel (GLA), on a CPU.

Scores of one chunk go step by step, with the keys faded by one more step each time: no difference of
summed-up logarithms, no exponential of a long span (README.md). The rest is matrix products of chunks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention.chunks import Layout, each_part, scan

# A product below this is taken for zero: subnormal numbers cost a processor a hundred times a normal one.
_TINY = 1e-37


class Faded(NamedTuple):
    """A chunk's queries and keys with their decay.

    Attributes:
        scores: Of the chunk's own pairs, `[m, c, c]`.
        q: Queries faded from the chunk's beginning (its end when reversed) to their step, `[m, c, K]`.
        k: Keys faded from their step to the chunk's end, `[m, c, K]`.
        whole: What is left after the chunk of the state before it, `[m, K]`.
    """

    scores: Tensor
    q: Tensor
    k: Tensor
    whole: Tensor


class Fading(Protocol):
    """The two computations inside a chunk, in torch here and compiled in `numba.py`."""

    def fade(self, q: Tensor, k: Tensor, log_decay: Tensor, scale: float, reverse: bool) -> Faded:
        """Fade queries and keys of chunks, `[m, c, K]` each; the queries are scaled, too."""

    def pull(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        scores: Tensor,
        faded_q: Tensor,
        faded_k: Tensor,
        whole: Tensor,
        scale: float,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradients of what `fade` returned to those of q, k and log_decay.

        The gradient of `whole` is that of its logarithm.
        """


class TorchFading:
    """`Fading` in torch: a loop over the steps of all chunks at once."""

    def fade(self, q: Tensor, k: Tensor, log_decay: Tensor, scale: float, reverse: bool) -> Faded:
        """See `Fading`."""
        decay, prefix, suffix, whole = _products(log_decay, reverse)
        size = q.shape[1]
        query, keys = q * scale, k.clone()
        scores = torch.zeros(*q.shape[:2], size)
        for i in _order(size, reverse):
            seen, before = _seen(i, size, reverse)
            _fade(keys, before, decay[:, i : i + 1])
            scores[:, i, seen] = (keys[:, seen] @ query[:, i, :, None])[..., 0]
        return Faded(scores, query * prefix, k * suffix, whole)

    def pull(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        scores: Tensor,
        faded_q: Tensor,
        faded_k: Tensor,
        whole: Tensor,
        scale: float,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Fading`."""
        decay, prefix, suffix, _ = _products(log_decay, reverse)
        size = q.shape[1]
        query, keys, queries = q * scale, k.clone(), q * scale
        dq, dk = torch.empty_like(q), torch.empty_like(k)  # of the pairs of two different steps
        for i in _order(size, reverse):
            _, before = _seen(i, size, reverse)
            _fade(keys, before, decay[:, i : i + 1])
            dq[:, i] = (scores[:, i : i + 1, before] @ keys[:, before])[:, 0]
        for j in _order(size, not reverse):
            _, after = _seen(j, size, not reverse)
            dk[:, j] = (scores[:, after, j][:, None] @ queries[:, after])[:, 0]
            queries[:, j] = query[:, j]
            _fade(queries, slice(min(j, after.start), max(j + 1, after.stop)), decay[:, j : j + 1])
        own = scores.diagonal(dim1=1, dim2=2)[..., None]
        read, kept = faded_q * prefix, faded_k * suffix
        ends = (query * (dq + read)).double() - (k * dk).double()
        ahead = (k * kept).double()
        decays = ends.cumsum(1) + _backwards(ahead) if reverse else _backwards(ends) + ahead.cumsum(1)
        decays += whole[:, None] - ahead
        return (dq + read + own * k) * scale, dk + kept + own * query, decays.float()


def _products(log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays, their products up to each step, after each step, and over the chunk."""
    total = log_decay.double().clamp(min=-1e4)
    total = _backwards(total) if reverse else total.cumsum(1)
    whole = total[:, :1] if reverse else total[:, -1:]
    decay, prefix, suffix, through = (
        torch.threshold_(x.float().exp_(), _TINY, 0.0)
        for x in (log_decay.clone(), total, whole - total, whole)
    )
    return decay, prefix, suffix, through[:, 0]


def _backwards(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def _order(size: int, reverse: bool) -> range:
    return range(size)[:: -1 if reverse else 1]


def _seen(i: int, size: int, reverse: bool) -> tuple[slice, slice]:
    """The steps that step i sees, with and without itself."""
    return (slice(i, size), slice(i + 1, size)) if reverse else (slice(0, i + 1), slice(0, i))


def _fade(x: Tensor, steps: slice, decay: Tensor) -> None:
    part = x[:, steps]
    part.mul_(decay)
    part.masked_fill_(part.abs() < _TINY, 0.0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    reverse: bool,
    plan: Layout,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs, the last state of each sequence and the state before each chunk.

    Shape:
        q, k, log_decay `[N, c, H, K]`; v, out `[N, c, H, V]`; state, last `[H, S, K, V]`; states
        `[H, N, K, V]`.
    """
    chunks, size, heads, dim = q.shape
    width = v.shape[3]
    states = torch.empty(heads, chunks, dim, width)
    whole = torch.empty(heads, chunks, dim, 1)
    scores, queries = torch.empty(heads, chunks, size, size), torch.empty(heads, chunks, size, dim)

    def add(g: int, at: slice) -> None:
        found = fading.fade(q[at, :, g], k[at, :, g], log_decay[at, :, g], scale, reverse)
        scores[g, at], queries[g, at], whole[g, at, :, 0] = found.scores, found.q, found.whole
        torch.bmm(found.k.mT, v[at, :, g], out=states[g, at])

    each_part(heads, chunks, size * max(dim, width), add)
    last = scan(states, whole, state, plan.steps, reverse)
    out = torch.empty_like(v)

    def attend(g: int, at: slice) -> None:
        out[at, :, g] = torch.bmm(queries[g, at], states[g, at]).baddbmm_(scores[g, at], v[at, :, g])

    each_part(heads, chunks, size * max(dim, width), attend)
    return out, last, states


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    grad_last: Tensor,
    scale: float,
    reverse: bool,
    plan: Layout,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pull the gradients of the outputs and of the last states back; shapes as in `forward`.

    Returns:
        The gradients of q, k, v, of the log-decays and of the first states.
    """
    chunks, size, heads, dim = q.shape
    width = v.shape[3]
    pulls = torch.empty_like(states)  # first what a chunk adds to the state's gradient, then what it meets
    whole = torch.empty(heads, chunks, dim, 1)
    scores, keys = torch.empty(heads, chunks, size, size), torch.empty(heads, chunks, size, dim)

    def add(g: int, at: slice) -> None:
        found = fading.fade(q[at, :, g], k[at, :, g], log_decay[at, :, g], scale, reverse)
        scores[g, at], keys[g, at], whole[g, at, :, 0] = found.scores, found.k, found.whole
        torch.bmm(found.q.mT, grad[at, :, g], out=pulls[g, at])

    each_part(heads, chunks, size * max(dim, width), add)
    first = scan(pulls, whole, grad_last, plan.steps, not reverse)
    dq, dk, dv, ddecay = (torch.empty_like(x) for x in (q, k, v, log_decay))

    def pull_back(g: int, at: slice) -> None:
        row, value = grad[at, :, g], v[at, :, g]
        dv[at, :, g] = torch.bmm(keys[g, at], pulls[g, at]).baddbmm_(scores[g, at].mT, row)
        near = torch.bmm(row, value.mT)
        near = near.triu_() if reverse else near.tril_()
        from_state, to_state = torch.bmm(row, states[g, at].mT), torch.bmm(value, pulls[g, at].mT)
        through = whole[g, at, :, 0] * (states[g, at] * pulls[g, at]).sum(-1)
        inputs = (q[at, :, g], k[at, :, g], log_decay[at, :, g])
        found = fading.pull(*inputs, near, from_state, to_state, through, scale, reverse)
        dq[at, :, g], dk[at, :, g], ddecay[at, :, g] = found

    each_part(heads, chunks, size * max(dim, width), pull_back)
    return dq, dk, dv, ddecay, first
