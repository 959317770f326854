"""Segment attention as a `torch.library` op, so that torch.compile, torch.export and opcheck know it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.core.ops.segment_attention.order import EdgeOrder


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    return_edge: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend along edges, by one backend; as `cpu.forward`, an edge output that is not wanted being empty."""
    chosen = (options[0], options[1], options[2])
    if backend == "cpu":
        from manyheads.core.ops.segment_attention import cpu

        out, product, logits, norm = cpu.forward(q, k, v, edge, edge_index, chosen, return_edge)
    else:
        paths = _paths(backend)
        sorted_edges = EdgeOrder(*order)
        out, product, logits, norm = paths.forward(
            q, k, v, edge, edge_index, sorted_edges, chosen, return_edge
        )
    return out, q.new_empty(0) if product is None else product, logits, norm


@torch.library.custom_op("manyheads::segment_attention", mutates_args=())
def segment_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    return_edge: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend along edges; as `forward`."""
    return forward(q, k, v, edge, edge_index, order, options, return_edge, backend)


@segment_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    return_edge: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nodes, heads, dim = q.shape
    edges = edge_index.shape[1]
    product = q.new_empty(edges, heads, dim) if return_edge else q.new_empty(0)
    logits = q.new_empty(edges, heads, dtype=torch.float32)
    return q.new_empty(q.shape), product, logits, q.new_empty(nodes, 2, heads, dtype=torch.float32)


def backward(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and edge (empty where there is none); as `cpu.backward`."""
    chosen = (options[0], options[1], options[2])
    given = dout, dproduct, q, k, v, edge, edge_index
    if backend == "cpu":
        from manyheads.core.ops.segment_attention import cpu

        dq, dk, dv, dedge = cpu.backward(*given, chosen, out, logits, norm)
    else:
        dq, dk, dv, dedge = _paths(backend).backward(*given, EdgeOrder(*order), chosen, out, logits, norm)
    return dq, dk, dv, q.new_empty(0) if dedge is None else dedge


@torch.library.custom_op("manyheads::segment_attention_backward", mutates_args=())
def segment_attention_backward_op(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and edge; as `backward`."""
    given = dout, dproduct, q, k, v, edge, edge_index
    return backward(*given, order, options, out, logits, norm, backend)


@segment_attention_backward_op.register_fake
def _(
    dout: Tensor,
    dproduct: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge: Tensor | None,
    edge_index: Tensor,
    order: list[Tensor],
    options: list[float],
    out: Tensor,
    logits: Tensor,
    norm: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dedge = q.new_empty(0) if edge is None else edge.new_empty(edge.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dedge


def _paths(backend: str) -> Any:
    if backend == "numba":
        from manyheads.core.ops.segment_attention import numba

        return numba
    from manyheads.core.ops.segment_attention import triton

    return triton


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, edge, edge_index, order, ctx.options, ctx.return_edge, ctx.backend = inputs
    out, _, logits, norm = output
    ctx.save_for_backward(q, k, v, edge, edge_index, out, logits, norm, *order)
    ctx.set_materialize_grads(False)


def _pull_back(run: Any, ctx: Any, dout: Tensor | None, dproduct: Tensor | None) -> tuple[Any, ...]:
    """Gradients of q, k, v and edge by `backward` or the op around it."""
    q, k, v, edge, edge_index, out, logits, norm, *order = ctx.saved_tensors
    if not ctx.return_edge:
        dproduct = None  # of the empty placeholder
    if dout is None and dproduct is None:
        return None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dedge = run(
        dout, dproduct, q, k, v, edge, edge_index, order, ctx.options, out, logits, norm, ctx.backend
    )
    return dq, dk, dv, None if edge is None else dedge


def _op_backward(
    ctx: Any, dout: Tensor | None, dproduct: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    grads = _pull_back(segment_attention_backward_op, ctx, dout, dproduct)
    return *grads, None, [None] * 4, None, None, None


segment_attention_op.register_autograd(_op_backward, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same outside of torch.compile, without the 0.1 ms that library ops take a training step."""

    forward = staticmethod(forward)
    setup_context = staticmethod(_setup)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dproduct: Tensor | None, *_: Tensor | None
    ) -> tuple[Any, ...]:
        """Gradients of the differentiable inputs, and None for the others."""
        return *_pull_back(backward, ctx, dout, dproduct), None, None, None, None, None
