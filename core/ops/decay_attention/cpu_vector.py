"""Chunked linear attention with a decay for each key channel (GLA), on a CPU.

What happens inside a chunk is in `fading.py`; the rest is matrix products of chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention.chunks import Layout, each_part, scan
from manyheads.core.ops.decay_attention.fading import Faded, Fading, Inputs, Pulls


def forward(
    given: Inputs, v: Tensor, state: Tensor, scale: float, plan: Layout, fading: Fading
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs, the last state of each sequence and the state before each chunk.

    Shape:
        v, out `[N, c, H, V]`; state, last `[H, S, K, V]`; states `[H, N, K, V]`.
    """
    chunks, size, heads, dim = given.q.shape
    states = torch.empty(heads, chunks, dim, v.shape[3])
    found = _room(given)

    def add(head: int, at: slice) -> None:
        fading.fade(given, found, head, at, scale)
        torch.bmm(found.k[head, at].mT, v[at, :, head], out=states[head, at])

    weight = size * max(dim, v.shape[3])
    each_part(heads, chunks, weight, add)
    last = scan(states, found.whole, state, plan.steps)
    out = torch.empty_like(v)

    def attend(head: int, at: slice) -> None:
        far = torch.bmm(found.q[head, at], states[head, at])
        out[at, :, head] = far.baddbmm_(found.scores[head, at], v[at, :, head])

    each_part(heads, chunks, weight, attend)
    return out, last, states


def _room(given: Inputs) -> Faded:
    chunks, size, heads, dim = given.q.shape
    shapes = ((size, size), (size, dim), (size, dim), (dim, 1))
    return Faded(*(torch.empty(heads, chunks, *shape) for shape in shapes))


def backward(
    grad: Tensor,
    given: Inputs,
    v: Tensor,
    states: Tensor,
    grad_last: Tensor,
    scale: float,
    plan: Layout,
    fading: Fading,
) -> tuple[Inputs, Tensor, Tensor]:
    """Pull the gradients of the outputs and of the last states back; shapes as in `forward`.

    Returns:
        The gradients of q, k and the log-decays, of v, and of the first states.
    """
    chunks, size, heads, dim = given.q.shape
    pulls = torch.empty_like(states)  # first what a chunk adds to the state's gradient, then what it meets
    faded = _room(given)

    def add(head: int, at: slice) -> None:
        fading.fade(given, faded, head, at, scale)
        torch.bmm(faded.q[head, at].mT, grad[at, :, head], out=pulls[head, at])

    weight = size * max(dim, v.shape[3])
    each_part(heads, chunks, weight, add)
    first = scan(pulls, faded.whole, grad_last, reversed(plan.steps))
    found, dv = Inputs(*(torch.empty_like(x) for x in given)), torch.empty_like(v)

    def pull_back(head: int, at: slice) -> None:
        row, value, state, pull = grad[at, :, head], v[at, :, head], states[head, at], pulls[head, at]
        dv[at, :, head] = torch.bmm(faded.k[head, at], pull).baddbmm_(faded.scores[head, at].mT, row)
        through = faded.whole[head, at, :, 0] * (state * pull).sum(-1)
        inner = Pulls(row @ value.mT, row @ state.mT, value @ pull.mT, through)
        fading.pull(given, inner, found, head, at, scale)

    each_part(heads, chunks, weight, pull_back)
    return found, dv, first
