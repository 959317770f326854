"""Linear attention with decay on a CPU, chunk by chunk: what a chunk's tokens add to each other as matrix
products, and one state from chunk to chunk. The backward keeps those states and computes the rest again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention import cpu_scalar, cpu_vector
from manyheads.core.ops.decay_attention.chunks import Layout, layout
from manyheads.core.ops.decay_attention.fading import Fading, Inputs

# Tokens of a chunk. A vector decay has no products of matrices inside a chunk, so its chunks are short.
SCALAR_CHUNK, VECTOR_CHUNK = 64, 16


def chunk_size(log_decay: Tensor | None) -> int:
    """Tokens of a chunk for this kind of decay."""
    return VECTOR_CHUNK if log_decay is not None and log_decay.dim() == 4 else SCALAR_CHUNK


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences.

    Shape:
        q, k `[B, L, G, K]`, G divides H; v, out `[B, L, H, V]`; log_decay `[B, L, H]`, or `[B, L, H, K]` with
        G = H, or None for no decay; initial_state, last `[S, H, K, V]`.

    Returns:
        out, of v's dtype; last, float32; the states before the chunks, `[G, N, K, H / G, V]`, for `backward`.
    """
    plan, query, key, value, gate = _prepare(q, k, v, log_decay, cu_seqlens, reverse)
    state = _grouped(initial_state, q, v, plan.sequences)
    if isinstance(gate, Tensor):
        given = Inputs(query, key, gate)
        out, last, states = cpu_vector.forward(given, value, state[:, :, :, 0], scale, plan, fading)
        last, states = last[:, :, :, None], states[:, :, :, None]
    else:
        out, last, states = cpu_scalar.forward(query, key, value, gate, state, scale, plan, fading)
    return plan.join(out, v.dtype).view(v.shape), _ungrouped(last), states


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scale: float,
    reverse: bool,
    fading: Fading,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Pull the gradients of out and last back to q, k, v, the log-decays and the initial state (float32)."""
    plan, query, key, value, gate = _prepare(q, k, v, log_decay, cu_seqlens, reverse)
    pull = _grouped(grad_last, q, v, plan.sequences)
    rows, states = plan.split(grad), states[:, : plan.chunks]
    ddecay: Tensor | None
    if isinstance(gate, Tensor):
        given = Inputs(query, key, gate)
        found, dv, first = cpu_vector.backward(
            rows, given, value, states[:, :, :, 0], pull[:, :, :, 0], scale, plan, fading
        )
        (dq, dk, ddecay), first = found, first[:, :, :, None]
    else:
        dq, dk, dv, ddecay, first = cpu_scalar.backward(
            rows.view(value.shape), query, key, value, gate, states, pull, scale, plan, fading
        )
    dq, dk, dv = (plan.join(x, like.dtype).view(like.shape) for x, like in ((dq, q), (dk, k), (dv, v)))
    if ddecay is not None and log_decay is not None:
        ddecay = plan.join(ddecay, log_decay.dtype).view(log_decay.shape)
    return dq, dk, dv, ddecay, _ungrouped(first)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Layout, Tensor, Tensor, Tensor, cpu_scalar.Gates | Tensor | None]:
    """Cut into chunks; v by the groups of heads that share q and k where the decay is scalar."""
    plan = layout(q.shape[0], q.shape[1], cu_seqlens, chunk_size(log_decay), reverse)
    query, key, value = (plan.split(x) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() == 4:
        return plan, query, key, value, plan.split(log_decay)
    value = value.unflatten(2, (q.shape[2], v.shape[2] // q.shape[2]))  # [N, c, G, h, V]
    if log_decay is None:
        return plan, query, key, value, None
    steps = plan.split(log_decay).unflatten(2, value.shape[2:4])
    return plan, query, key, value, cpu_scalar.gates(steps)


def _grouped(state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    """A state `[S, H, K, V]` as `[G, S, K, h, V]`, float32; zeros for None."""
    groups = q.shape[2]
    if state is None:
        return torch.zeros(groups, sequences, q.shape[3], v.shape[2] // groups, v.shape[3])
    return state.float().unflatten(1, (groups, v.shape[2] // groups)).permute(1, 0, 3, 2, 4)


def _ungrouped(state: Tensor) -> Tensor:
    """Undo `_grouped`."""
    return state.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()
