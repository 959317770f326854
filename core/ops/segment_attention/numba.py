"""Segment attention on a CPU by compiled loops: float32 arrays, ranges of nodes side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyheads.core.ops.segment_attention import numba_kernels as kernels
from manyheads.core.ops.segment_attention.order import EdgeOrder
from manyheads.core.parallel import run, workers

_SMALL = 1 << 15  # multiply-adds that are over before a second thread has begun
_loops: Any = kernels  # their arguments come partly by the star, which mypy cannot count
_NOTHING = np.empty((0, 0), np.float32)

Options = tuple[float, float, float]  # scale, clamp (infinite where there is none), eps


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: EdgeOrder,
    options: Options,
    return_edge: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Attend along edges; arguments and results as `cpu.forward`."""
    nodes, heads, dim = q.shape
    edges = edge_index.shape[1]
    out = torch.empty(q.shape, dtype=torch.float32)
    product = torch.empty(edges, *q.shape[1:]) if return_edge else None
    logits, norm = torch.empty(edges, heads), torch.empty(nodes, 2, heads)
    loop = partial(
        _loops.forward,
        _rows(q),
        _rows(k),
        _rows(v),
        _rows(edge),
        *_ends(edge_index),
        order.into.numpy(),
        order.into_start.numpy(),
        *map(np.float32, options),
        _rows(out),
        _rows(product),
        logits.numpy(),
        norm.numpy(),
    )
    _over_nodes(loop, order.into_start, (edges + nodes) * heads * dim)
    return out.to(q.dtype), None if product is None else product.to(q.dtype), logits, norm


def backward(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: EdgeOrder,
    options: Options,
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and edge; arguments as `cpu.backward`."""
    scale, clamp = map(np.float32, options[:2])
    dq, dk, dv = (torch.empty(q.shape, dtype=torch.float32) for _ in range(3))
    dedge = None if edge is None else torch.empty(edge.shape, dtype=torch.float32)
    weights, dlogits = torch.empty_like(logits).numpy(), torch.empty_like(logits).numpy()
    douts, dproducts, queries, edges = _rows(dout), _rows(dproduct), _rows(q), _rows(edge)
    work = (edge_index.shape[1] + q.shape[0]) * q.shape[1] * q.shape[2]
    into = partial(
        _loops.backward_into,
        douts,
        dproducts,
        queries,
        _rows(k),
        _rows(v),
        edges,
        *_ends(edge_index),
        order.into.numpy(),
        order.into_start.numpy(),
        scale,
        clamp,
        _rows(out),
        logits.numpy(),
        norm.numpy(),
        _rows(dq),
        _rows(dedge),
        weights,
        dlogits,
    )
    _over_nodes(into, order.into_start, work)
    outward = partial(
        _loops.backward_out,
        douts,
        dproducts,
        queries,
        edges,
        *_ends(edge_index),
        order.out.numpy(),
        order.out_start.numpy(),
        scale,
        weights,
        dlogits,
        _rows(dk),
        _rows(dv),
    )
    _over_nodes(outward, order.out_start, work)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if dedge is None else dedge.to(q.dtype)


def _over_nodes(loop: Callable[[int, int], Any], start: Tensor, work: int) -> None:
    """Run a loop over all nodes, in ranges of about the same number of edges."""
    nodes, edges = start.numel() - 1, int(start[-1])
    count = 1 if work < _SMALL else workers()
    bounds = [
        0,
        *np.searchsorted(start.numpy(), [edges * i // count for i in range(1, count)]).tolist(),
        nodes,
    ]
    run([partial(loop, first, last) for first, last in pairwise(bounds)])


def _rows(x: Tensor | None) -> np.ndarray[Any, Any]:
    """x as float32 rows of all heads."""
    if x is None:
        return _NOTHING
    return x.detach().to(torch.float32).contiguous().numpy().reshape(x.shape[0], x.shape[1] * x.shape[2])


def _ends(edge_index: Tensor) -> Sequence[np.ndarray[Any, Any]]:
    """The edges' sources and destinations."""
    both = edge_index.long().contiguous().numpy()
    return both[0], both[1]
