"""Segment attention, the plain formula: gather, softmax by `index_add`, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.ops.precision import wide
from manyheads.core.ops.segment_attention.order import EdgeOrder


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge: Tensor | None = None,
    scale: float | None = None,
    clamp: float | None = None,
    eps: float = 0.0,
    return_edge: bool = False,
    order: EdgeOrder | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend along edges; as the public function, `order` unused. Half precision is computed in float32."""
    del order
    source, target = edge_index.long()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    product = wide(k)[source] * wide(q)[target] * scale  # [E, H, D]
    if edge is not None:
        product = product * wide(edge)
    logit = product.sum(-1)  # [E, H]
    nodes = q.shape[0], q.shape[1]
    if clamp is not None:
        logit = logit.clamp(-clamp, clamp)
    else:
        index = target[:, None].expand(logit.shape)
        largest = (
            logit.detach()
            .new_zeros(nodes)
            .scatter_reduce(0, index, logit.detach(), "amax", include_self=False)
        )
        logit = logit - largest[target]
    weight = logit.exp()
    total = weight.new_zeros(nodes).index_add(0, target, weight)
    found = torch.zeros(nodes[0], 1, dtype=torch.bool, device=q.device).index_fill(0, target, True)
    total = torch.where(found, total + eps, 1)  # [N, H]; a node without edges gets zeros
    mixed = torch.zeros_like(wide(v)).index_add(0, target, weight[..., None] * wide(v)[source])
    out = (mixed / total[..., None]).to(q.dtype)
    return (out, product.to(q.dtype)) if return_edge else out
