"""The selective scan in torch on a CPU: streamed chunks that stay in the cache, and an explicit backward.

A chunk's decays and inputs are whole tensors; only the recurrence itself goes step by step, one fused
multiply-add each, in place. Nothing of the size L x D x N is ever held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.selective_scan.inputs import CHUNK, Gradients, Inputs

# Sequences side by side: more fill a step's operation better, fewer keep a chunk in the cache.
_TOGETHER = 4


class _Span(NamedTuple):
    """Sequences of equal length: rows of the batch, steps of each, and their numbers among all."""

    rows: slice
    steps: slice
    numbers: slice


class _Chunk(NamedTuple):
    """A chunk's own tensors: B sequences, T steps, N states, D channels."""

    at: tuple[slice, slice]
    order: list[int]
    raw: Tensor  # [B, T, D] delta and its bias, before the softplus
    dt: Tensor  # [B, T, D]
    u: Tensor  # [B, T, D]
    B: Tensor  # [B, T, N]
    C: Tensor  # [B, T, N]
    decay: Tensor  # [B, T, N, D]
    h: Tensor  # [B, T, N, D] the states after each step
    before: Tensor  # [B, N, D] the state before the first


def forward(x: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; return y in u's dtype, the last states `[S, D, N]` and the kept ones `[slots, N, D]`, or none."""
    d, n = x.A.shape
    starts = x.starts()
    y = torch.empty(x.u.shape, dtype=x.u.dtype)
    last = _states(x, x.initial_state)
    kept = torch.empty(x.slots() if keep else 0, n, d)
    for span in _spans(x):
        h = last[span.numbers].transpose(1, 2)  # [B, N, D]
        for number, (steps, order) in enumerate(_chunks(span.steps, x.reverse)):
            if keep:
                kept[_slots(starts, span, number)] = h
            chunk = _scan(x, (span.rows, steps), order, h)
            h = chunk.h[:, order[-1]]
            y[chunk.at] = (_read(x, chunk) * _gate(x, chunk)).to(y.dtype)
        last[span.numbers] = h.transpose(1, 2)
    return y, last, kept


def backward(x: Inputs, kept: Tensor, dy: Tensor, dlast: Tensor | None) -> Gradients:
    """Pull the gradients of y and of the last states back, from the states that the forward kept."""
    d, n = x.A.shape
    starts = x.starts()
    du, ddelta, dz = (torch.empty(x.u.shape) for _ in range(3))
    db, dc = torch.empty(x.B.shape), torch.empty(x.C.shape)
    da, dskip, dbias = (torch.zeros(*s, dtype=torch.float64) for s in ((n, d), (d,), (d,)))
    dstate = _states(x, dlast)
    a = x.A.float().t()  # [N, D]
    for span in _spans(x):
        carry = dstate[span.numbers].transpose(1, 2)  # [B, N, D] of the state after the chunk
        for number, (steps, order) in reversed(list(enumerate(_chunks(span.steps, x.reverse)))):
            chunk = _scan(x, (span.rows, steps), order, kept[_slots(starts, span, number)])
            g = dy[chunk.at].float()  # [B, T, D]
            if x.z is not None:
                gate = x.z[chunk.at].float()
                share = torch.sigmoid(gate)
                dz[chunk.at] = g * _read(x, chunk) * share * (1 + gate * (1 - share))
                g = g * (gate * share)
            dh = g[:, :, None] * chunk.C[..., None]  # [B, T, N, D]
            dh[:, order[-1]] += carry
            for after, now in zip(reversed(order), reversed(order[:-1]), strict=False):
                dh[:, now].addcmul_(chunk.decay[:, after], dh[:, after])
            carry = chunk.decay[:, order[0]] * dh[:, order[0]]
            dc[chunk.at] = _over_channels(chunk.h, g)
            db[chunk.at] = _over_channels(dh, chunk.dt * chunk.u)
            into = _over_states(dh, chunk.B)
            earlier = torch.empty_like(chunk.h)
            earlier[:, order[0]] = chunk.before
            earlier[:, order[1:]] = chunk.h[:, order[:-1]]
            pull = dh.mul_(chunk.decay).mul_(earlier)  # of delta * A
            rate = (pull * a).sum(2) + into * chunk.u
            da += (pull * chunk.dt[:, :, None]).sum((0, 1), dtype=torch.float64)
            du[chunk.at] = into * chunk.dt
            if x.D is not None:
                du[chunk.at] += g * x.D.float()
                dskip += (g * chunk.u).sum((0, 1))
            if x.delta_softplus:
                rate = rate * torch.sigmoid(chunk.raw)
            ddelta[chunk.at] = rate
            dbias += rate.sum((0, 1))
        dstate[span.numbers] = carry.transpose(1, 2)
    return (
        du,
        ddelta,
        da.t(),
        db,
        dc,
        None if x.D is None else dskip,
        None if x.z is None else dz,
        None if x.delta_bias is None else dbias,
        None if x.initial_state is None else dstate,
    )


def _states(x: Inputs, given: Tensor | None) -> Tensor:
    """States `[S, D, N]` to be written over: zeros, or a copy."""
    states = torch.zeros(x.sequences(), *x.A.shape)
    return states if given is None else states.copy_(given)


def _spans(x: Inputs) -> Iterator[_Span]:
    """Groups of rows of the batch, or the packed sequences one by one."""
    batch, length, _ = x.u.shape
    if x.cu_seqlens is None:
        for first in range(0, batch, _TOGETHER):
            rows = slice(first, min(batch, first + _TOGETHER))
            yield _Span(rows, slice(0, length), rows)
    else:
        ends = x.starts().tolist()
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            yield _Span(slice(0, 1), slice(start, end), slice(number, number + 1))


def _chunks(steps: slice, reverse: bool) -> Iterator[tuple[slice, list[int]]]:
    """The chunks of a sequence as the scan meets them, each with the order of its steps."""
    for first in range(0, steps.stop - steps.start, CHUNK):
        size = min(CHUNK, steps.stop - steps.start - first)
        start = steps.stop - first - size if reverse else steps.start + first
        order = list(range(size))
        yield slice(start, start + size), order[::-1] if reverse else order


def _slots(starts: Tensor, span: _Span, number: int) -> Tensor:
    """Where the states before a chunk of these sequences are kept."""
    sequences = torch.arange(span.numbers.start, span.numbers.stop)
    return starts[sequences] // CHUNK + sequences + number


def _scan(x: Inputs, at: tuple[slice, slice], order: list[int], h: Tensor) -> _Chunk:
    """A chunk's states, from the one before it."""
    raw, u = x.delta[at].float(), x.u[at].float()
    if x.delta_bias is not None:
        raw = raw + x.delta_bias.float()
    dt = F.softplus(raw) if x.delta_softplus else raw
    B, C = x.B[at].float(), x.C[at].float()
    decay = torch.exp_(dt[:, :, None] * x.A.float().t())  # [B, T, N, D]
    states = (dt * u)[:, :, None] * B[..., None]
    previous = h
    for i in order:
        previous = states[:, i].addcmul_(decay[:, i], previous)
    return _Chunk(at, order, raw, dt, u, B, C, decay, states, h)


def _read(x: Inputs, chunk: _Chunk) -> Tensor:
    """y before the gate, `[B, T, D]`."""
    y = _over_states(chunk.h, chunk.C)
    return y if x.D is None else y.addcmul_(x.D.float(), chunk.u)


def _gate(x: Inputs, chunk: _Chunk) -> Tensor | float:
    return 1.0 if x.z is None else F.silu(x.z[chunk.at].float())


def _over_states(states: Tensor, weights: Tensor) -> Tensor:
    """Sum `[B, T, N, D]` over N with weights `[B, T, N]`."""
    return torch.matmul(weights[:, :, None], states)[:, :, 0]


def _over_channels(states: Tensor, weights: Tensor) -> Tensor:
    """Sum `[B, T, N, D]` over D with weights `[B, T, D]`."""
    return torch.matmul(states, weights[..., None])[..., 0]
