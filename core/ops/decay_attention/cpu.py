"""Linear attention with decay on a CPU, chunk by chunk: what a chunk's tokens add to each other as matrix
products, and one state from chunk to chunk. The backward keeps those states and computes the rest again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.decay_attention import cpu_scalar, cpu_vector
from manyheads.core.ops.decay_attention.chunks import Layout, layout

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
    fading: cpu_vector.Fading,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences.

    Shape:
        q, k `[B, L, G, K]`, G divides H; v, out `[B, L, H, V]`; log_decay `[B, L, H]`, or `[B, L, H, K]` with
        G = H, or None for no decay; initial_state, last `[S, H, K, V]`.

    Returns:
        out, of v's dtype; last, float32; the states before the chunks, `[G, N, K, H / G, V]`, for `backward`.
    """
    plan, inputs, gate = _prepare(q, k, v, log_decay, cu_seqlens, reverse)
    state = _grouped(initial_state, q, v, plan.sequences)
    if isinstance(gate, Tensor):
        state = state[:, :, :, 0]
        out, last, states = cpu_vector.forward(*inputs, gate, state, scale, reverse, plan, fading)
        states = states[:, :, :, None]
    else:
        out, last, states = cpu_scalar.forward(*inputs, gate, state, scale, reverse, plan)
    return plan.join(out, v.dtype).reshape(v.shape), _ungrouped(last, v), states


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
    fading: cpu_vector.Fading,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Pull the gradients of out and last back to q, k, v, the log-decays and the initial state (float32)."""
    plan, inputs, gate = _prepare(q, k, v, log_decay, cu_seqlens, reverse)
    pull = _grouped(grad_last, q, v, plan.sequences)
    ddecays: Tensor | None
    rows, states = plan.split(grad), states[:, : plan.chunks]
    if isinstance(gate, Tensor):
        dq, dk, dv, ddecays, first = cpu_vector.backward(
            rows, *inputs, gate, states[:, :, :, 0], pull[:, :, :, 0], scale, reverse, plan, fading
        )
    else:
        rows = rows.view(inputs[2].shape)
        dq, dk, dv, ddecays, first = cpu_scalar.backward(
            rows, *inputs, gate, states, pull, scale, reverse, plan
        )
    found = [plan.join(x, like.dtype).view(like.shape) for x, like in ((dq, q), (dk, k), (dv, v))]
    if log_decay is None or ddecays is None:
        return found[0], found[1], found[2], None, _ungrouped(first, v)
    decays = plan.join(ddecays.reshape(*dv.shape[:2], *log_decay.shape[2:]), log_decay.dtype)
    return found[0], found[1], found[2], decays, _ungrouped(first, v)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Layout, tuple[Tensor, Tensor, Tensor], cpu_scalar.Gates | Tensor | None]:
    """Cut into chunks; v by the groups of heads that share q and k where the decay is scalar."""
    plan = layout(q.shape[0], q.shape[1], cu_seqlens, chunk_size(log_decay))
    query, key, value = (plan.split(x) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() == 4:
        return plan, (query, key, value), plan.split(log_decay)
    groups = q.shape[2]
    value = value.unflatten(2, (groups, v.shape[2] // groups))
    if log_decay is None:
        return plan, (query, key, value), None
    steps = plan.split(log_decay).unflatten(2, value.shape[2:4])
    return plan, (query, key, value), cpu_scalar.gates(steps, reverse)


def _grouped(state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    """A state `[S, H, K, V]` as `[G, S, K, h, V]`, float32; zeros for None."""
    groups = q.shape[2]
    if state is None:
        return torch.zeros(groups, sequences, q.shape[3], v.shape[2] // groups, v.shape[3])
    return state.float().unflatten(1, (groups, v.shape[2] // groups)).permute(1, 0, 3, 2, 4)


def _ungrouped(state: Tensor, v: Tensor) -> Tensor:
    """Undo `_grouped`; a vector decay's state comes as `[H, S, K, V]`."""
    if state.dim() == 4:
        return state.transpose(0, 1).contiguous()
    return state.permute(1, 0, 3, 2, 4).reshape(state.shape[1], v.shape[2], state.shape[2], v.shape[3])
