"""Attention along the edges of a graph, with edge channels: the public functions and their dispatch.

The mathematics, with the backward's derivation, is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.segment_attention import reference
from manyheads.core.ops.segment_attention.custom_op import Eager, forward, segment_attention_op
from manyheads.core.ops.segment_attention.order import EdgeOrder, edge_order

__all__ = ["EdgeOrder", "edge_order", "segment_attention"]


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge: Tensor | None = ...,
    scale: float | None = ...,
    clamp: float | None = ...,
    eps: float = ...,
    return_edge: Literal[False] = ...,
    order: EdgeOrder | None = ...,
) -> Tensor: ...
@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge: Tensor | None = ...,
    scale: float | None = ...,
    clamp: float | None = ...,
    eps: float = ...,
    return_edge: Literal[True],
    order: EdgeOrder | None = ...,
) -> tuple[Tensor, Tensor]: ...
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
    """Let each node attend to the sources of its incoming edges, a softmax over each node's edges.

    An edge from j to i has the product `t = k[j] * q[i] * scale * edge` (channel by channel), the logit
    `sum(t)` over the head's channels, and its source's value `v[j]`.

    Args:
        q, k, v: Queries, keys and values of the nodes, one dtype.
        edge_index: Sources in row 0, destinations in row 1; any order, repeated edges allowed.
        edge: Multiplies the products.
        scale: None for `D ** -0.5`.
        clamp: Bound the logits to -clamp..clamp, where their gradient is zero outside, instead of taking the
            largest from them; the Graph Transformer has 5. None for the plain softmax.
        eps: Added to the sum of the exponentials; only with `clamp` (the Graph Transformer with edges has
            1e-6, without edges 0).
        return_edge: Return the products too: the Graph Transformer's edge output.
        order: `edge_order(edge_index, N)`, for callers that use the same edges again; made here otherwise.

    Shape:
        q, k, v, output: `[N, H, D]`; edge_index: `[2, E]`; edge, edge output: `[E, H, D]`.

    Returns:
        The output, zeros for a node without incoming edges; with `return_edge` (output, products).

    Raises:
        TypeError: Dtypes differ or are not floating point, or edge_index is not of an integer dtype.
        ValueError: Shapes or options do not fit, or edge_index names a node that is not there.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Dwivedi and Bresson 2020, arXiv 2012.09699.

    Example:
        >>> h, e = segment_attention(q, k, v, edge_index, edge=e, clamp=5.0, eps=1e-6, return_edge=True)
    """
    _check(q, k, v, edge_index, edge, clamp, eps, order)
    options = {"edge": edge, "scale": scale, "clamp": clamp, "eps": eps, "return_edge": return_edge}
    features = {"width": "wide" if q.shape[-1] > 128 else "usual"}
    backend = choose("segment_attention", device=q.device.type, dtype=q.dtype, **features).backend
    if backend == "reference":
        return reference.segment_attention(q, k, v, edge_index, **options)  # type: ignore[arg-type]
    if order is None:
        order = edge_order(edge_index, q.shape[0])
    numbers = [q.shape[-1] ** -0.5 if scale is None else scale, float("inf") if clamp is None else clamp, eps]
    run = _run(backend, q, k, v, edge)
    out, product, _, _ = run(q, k, v, edge, edge_index, list(order), numbers, return_edge, backend)
    return (out, product) if return_edge else out


def _run(backend: str, *inputs: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """The library op where kernels or torch.compile need it, else what costs less."""
    if backend == "triton" or torch.compiler.is_compiling():
        return segment_attention_op
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return Eager.apply if learns else forward


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    edge: Tensor | None,
    clamp: float | None,
    eps: float,
    order: EdgeOrder | None,
) -> None:
    op = "segment_attention"
    if q.dim() != 3:
        raise ValueError(f"{op}: q must be [N, H, D], not {tuple(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must be floating point, not {q.dtype}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: edge_index must be int64 or int32, not {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"{op}: edge_index must be [2, E], not {tuple(edge_index.shape)}")
    rows = edge_index.shape[1], *q.shape[1:]
    for name, x, shape in (("k", k, q.shape), ("v", v, q.shape), ("edge", edge, rows)):
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {list(shape)}, not {tuple(x.shape)}")
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, and q is {q.dtype}")
    if clamp is None and eps:
        raise ValueError(f"{op}: eps is for the clamped form: give clamp, or leave eps at 0")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be positive, not {clamp}")
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, not {eps}")
    sizes = (rows[0], q.shape[0] + 1) * 2
    if order is not None and tuple(x.numel() for x in order) != sizes:
        raise ValueError(f"{op}: order belongs to another graph than edge_index and q")
