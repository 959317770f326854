"""Chunked linear attention with one decay a head and step (or none), on a CPU: matrix products of chunks.

README.md has the derivation. q and k have G heads, of which each serves h of the H = G h heads of v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention.chunks import Layout, blocks, scan
from manyheads.core.ops.decay_attention.fading import Fading, backwards, sums, weights


class Gates(NamedTuple):
    """What the log-decays of a chunk amount to.

    Attributes:
        total: Sums of log-decays from the chunk's beginning, `[N, c, G, h]`, float64.
        prefix: What is left at a step of the state before the chunk, `[N, c, G, h]`.
        suffix: What is left of a step's own product after the chunk, `[N, c, G, h]`.
        whole: What is left after the chunk of the state before it, `[G, N, 1, h, 1]`.
    """

    total: Tensor
    prefix: Tensor
    suffix: Tensor
    whole: Tensor


def gates(log_decay: Tensor) -> Gates:
    """Sum up a chunk's log-decays `[N, c, G, h]`."""
    total, whole = sums(log_decay)
    through = weights(whole)[:, 0].movedim(0, 1)  # [G, N, h]
    return Gates(total, weights(total), weights(whole - total), through[:, :, None, :, None])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Gates | None,
    state: Tensor,
    scale: float,
    plan: Layout,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs, the last state of each sequence and the state before each chunk.

    Shape:
        q, k `[N, c, G, K]`; v `[N, c, G, h, V]`; state, last `[G, S, K, h, V]`; out as v; states
        `[G, N, K, h, V]`.
    """
    chunks, size, groups, _ = q.shape
    shared, width = v.shape[3:]
    states = torch.empty(groups, chunks, q.shape[3], shared, width)
    parts = blocks(groups, chunks, shared * size * max(size, width))
    for g, at in parts:
        value = v[at, :, g] if gate is None else v[at, :, g] * gate.suffix[at, :, g, :, None]
        torch.bmm(k[at, :, g].transpose(1, 2), value.flatten(2), out=states[g, at].flatten(2))
    last = scan(states, None if gate is None else gate.whole, state, plan.steps)
    out = torch.empty_like(v)
    for g, at in parts:
        scores = _scores(q[at, :, g], k[at, :, g], scale)
        scores = _weigh(scores, gate, g, at, fading)
        near = scores @ v[at, :, g].transpose(1, 2)  # [m, h, c, V]
        far = _far(q[at, :, g], states[g, at], scale, gate, g, at)
        torch.add(far, near.transpose(1, 2), out=out[at, :, g])
    return out, last, states


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)  # [m, c, c]


def _weigh(scores: Tensor, gate: Gates | None, g: int, at: slice, fading: Fading) -> Tensor:
    """The scores with their decay, `[m, h, c, c]`."""
    if gate is None:
        return scores.tril()[:, None]
    return fading.remaining(gate.total, g, at, False).mul_(scores[:, None])


def _far(q: Tensor, states: Tensor, scale: float, gate: Gates | None, g: int, at: slice) -> Tensor:
    """What the queries read from the states before their chunks, `[m, c, h, V]`."""
    found = torch.baddbmm(q.new_zeros(()), q, states.flatten(2), beta=0, alpha=scale)
    found = found.view(*q.shape[:2], *states.shape[2:])
    return found if gate is None else found.mul_(gate.prefix[at, :, g, :, None])


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Gates | None,
    states: Tensor,
    grad_last: Tensor,
    scale: float,
    plan: Layout,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Pull the gradients of the outputs and of the last states back.

    Queries and their gradients run backwards in their chunks: products sum over them, and what decays most
    must come first, as in the recurrence, or each of the small terms rounds the large sum once more.

    Args:
        states: The state before each chunk, from `forward`.

    Shape:
        grad as v; grad_last as the state; the rest as in `forward`.

    Returns:
        The gradients of q, k, v, of the log-decays `[N, c, G, h]` (None without) and of the first states.
    """
    chunks, size, groups, _ = q.shape
    shared, width = v.shape[3:]
    grad, q = grad.flip(1), q.flip(1)
    gate = None if gate is None else gate._replace(prefix=gate.prefix.flip(1))
    pulls = torch.empty_like(states)  # first what a chunk adds to the state's gradient, then what it meets
    parts = blocks(groups, chunks, shared * size * max(size, width))
    for g, at in parts:
        pull = grad[at, :, g] if gate is None else grad[at, :, g] * gate.prefix[at, :, g, :, None]
        added = pulls[g, at].flatten(2)
        torch.baddbmm(added, q[at, :, g].transpose(1, 2), pull.flatten(2), beta=0, alpha=scale, out=added)
    whole = None if gate is None else gate.whole
    first = scan(pulls, whole, grad_last, reversed(plan.steps))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    steps = None if gate is None else torch.empty_like(gate.total)
    for g, at in parts:
        part = (grad[at, :, g], q[at, :, g], k[at, :, g], v[at, :, g], states[g, at], pulls[g, at])
        found = _pull_part(*part, gate, g, at, scale, fading)
        dq[at, :, g], dk[at, :, g], dv[at, :, g] = found[:3]
        if steps is not None and found[3] is not None:
            steps[at, :, g] = found[3]
    return dq.flip(1), dk, dv, steps, first


def _pull_part(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    pulls: Tensor,
    gate: Gates | None,
    g: int,
    at: slice,
    scale: float,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of the chunks `at` of one group; shapes as in `forward`, without the group."""
    scores = _scores(q, k, scale)  # [m, c, c], rows backwards
    row = grad.transpose(1, 2)  # [m, h, c, V]
    near = row @ v.transpose(1, 2).mT  # [m, h, c, c]
    reach = torch.bmm(k, pulls.flatten(2)).view(v.shape)  # [m, c, h, V]
    if gate is None:
        seen = torch.ones_like(scores[0]).tril_().flip(0)
        attended, near = (scores * seen)[:, None], near.mul_(seen)
        from_state, to_state, ddecay = grad, v, None
    else:
        left = fading.remaining(gate.total, g, at, True)
        attended = left * scores[:, None]
        prefix, suffix = gate.prefix[at, :, g, :, None], gate.suffix[at, :, g, :, None]
        reach = reach.mul_(suffix)
        read = _far(q, states, scale, gate, g, at).mul_(grad).sum(-1)  # [m, c, h]
        kept = (reach * v).sum(-1).double()
        through = gate.whole[g, at, 0, :, 0] * (states * pulls).sum((1, 3))  # [m, h]
        ddecay = _pull_decay(attended * near, read, kept, through)
        near = near.mul_(left)
        from_state, to_state = grad * prefix, v * suffix
    dv = reach.add_((attended.mT @ row).transpose(1, 2))
    score = near.sum(1)  # [m, c, c]
    dq = torch.bmm(from_state.flatten(2), states.flatten(2).mT).baddbmm_(score, k).mul_(scale)
    dk = torch.bmm(to_state.flatten(2), pulls.flatten(2).mT).baddbmm_(score.mT, q, alpha=scale)
    return dq, dk, dv, ddecay


def _pull_decay(pairs: Tensor, read: Tensor, kept: Tensor, through: Tensor) -> Tensor:
    """The gradient of each step's log-decay, `[m, c, h]`.

    Args:
        pairs: The gradient of each pair's exponent, `[m, h, c, c]`, rows backwards; a step counts for the
            pairs across it.
        read: That of the exponent between the state before the chunk and each step, backwards, `[m, c, h]`.
        kept: That of the exponent between each step and the chunk's end, `[m, c, h]`.
        through: That of the whole chunk's, `[m, h]`.
    """
    size = pairs.shape[-1]
    pairs.flatten(2)[..., size - 1 : -1 : size - 1] = 0.0  # a step's own product has no decay
    rows, columns = (pairs.sum(axis, dtype=torch.float64).transpose(1, 2) for axis in (-1, -2))
    from_end = (rows + read).cumsum(1).flip(1)
    return from_end - backwards(columns) + kept.cumsum(1) - kept + through[:, None]
