"""Segment attention on a CPU in plain torch: gathers and `index_add`, with the backward written out.

Needs neither sorted edges nor numba. Kept for the backward are the logits `[E, H]` and each node's maximum
and share; the products of queries, keys and edges `[E, H, D]` are made again.
"""

from __future__ import annotations

import torch
from torch import Tensor

Options = tuple[float, float, float]  # scale, clamp (infinite where there is none), eps


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    options: Options,
    return_edge: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Attend along edges.

    Args:
        options: scale; clamp, infinite where there is none; eps.
        return_edge: Return the edge output too.

    Shape:
        q, k, v: `[N, H, D]`; edge: `[E, H, D]`; edge_index: `[2, E]`.

    Returns:
        The output `[N, H, D]`, the edge output `[E, H, D]`, the logits before the clamp `[E, H]`, and for the
        backward each node's largest logit (zero with a clamp) and 1 / sum `[N, 2, H]`.
    """
    (scale, clamp, eps), (source, target) = options, edge_index.long()
    q32, k32, v32 = q.float(), k.float(), v.float()
    product = (q32 * scale)[target].mul_(k32[source])  # [E, H, D]
    if edge is not None:
        product.mul_(edge)
    logits = product.sum(-1)
    largest, total = torch.zeros(2, *q.shape[:2])
    if clamp == float("inf"):
        index = target[:, None].expand(logits.shape)
        largest = largest.scatter_reduce(0, index, logits, "amax", include_self=False)
    weights = _weights(logits, clamp, largest[target])
    total.index_add_(0, target, weights)
    found = torch.zeros(q.shape[0], 1, dtype=torch.bool).index_fill_(0, target, True)
    share = torch.where(found, 1 / (total + eps), 0)  # [N, H]; a node without edges gets zeros
    out = torch.zeros(q.shape).index_add_(0, target, v32[source].mul_(weights[..., None]))
    out.mul_(share[..., None])
    norm = torch.stack([largest, share], 1)
    return out.to(q.dtype), product.to(q.dtype) if return_edge else None, logits, norm


def backward(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    options: Options,
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and edge, from those of the output and (or None) the edge output."""
    (scale, clamp, _), (source, target) = options, edge_index.long()
    q32, k32, dout32 = q.float(), k.float(), dout.float()
    weights = _weights(logits, clamp, norm[:, 0][target]) * norm[:, 1][target]  # [E, H]
    pulled = dout32[target]  # [E, H, D]
    dlogits = (pulled * v.float()[source]).sum(-1) - (dout32 * out.float()).sum(-1)[target]
    dlogits.mul_(weights).masked_fill_(logits.abs() > clamp, 0.0)
    dv = torch.zeros(v.shape).index_add_(0, source, pulled.mul_(weights[..., None]))
    pull = dlogits[..., None] if dproduct is None else dproduct.float() + dlogits[..., None]
    pull = pull * scale
    queries, keys = q32[target], k32[source]
    dedge = None if edge is None else (pull * queries * keys).to(edge.dtype)
    if edge is not None:
        pull = pull * edge
    dq = torch.zeros(q.shape).index_add_(0, target, keys.mul_(pull))
    dk = torch.zeros(k.shape).index_add_(0, source, queries.mul_(pull))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dedge


def _weights(logits: Tensor, clamp: float, largest: Tensor) -> Tensor:
    return (logits.clamp(-clamp, clamp) - largest).exp_()
