"""A layer of the Graph Transformer in training on a CPU, as one step of autograd.

Torch goes through a layer in some sixty operations, each of which reads and writes all rows and waits for its
threads. Compiled loops (`graph_transformer_kernels`) take blocks of rows through several of them while they lie
in the cache, and threads are woken once. They ask for whole vectors and for CPUs on which PyTorch's own products
leave these unused (`core.products`); elsewhere, and with dropout or other norms, the layer is its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manyheads.core import buffers, parallel
from manyheads.core.dispatch import numba_installed
from manyheads.core.ops import EdgeOrder
from manyheads.core.products import is_plain, wide_vectors_unused

EACH = 10  # parameters of a stream


class Stream(NamedTuple):
    """The layers behind the attention, of nodes or edges."""

    output: nn.Module
    norm1: nn.Module
    expand: nn.Module
    contract: nn.Module
    norm2: nn.Module


class Edges(NamedTuple):
    """A graph's edges and what the attention does with them."""

    edge_index: Tensor
    order: EdgeOrder
    heads: int
    scale: float
    clamp: float
    eps: float


def fits(projections: Sequence[nn.Module], streams: Sequence[Stream], *states: Tensor) -> bool:
    """Tell whether `layer_step` can run: plain layers in training, whole vectors, the right CPU.

    Args:
        projections: Of queries, keys, values and perhaps edges.
        streams: Of nodes and perhaps edges.
        states: Theirs.
    """
    if not (is_plain(*states) and wide_vectors_unused() and numba_installed() and torch.is_grad_enabled()):
        return False
    width = states[0].shape[1]
    linear = all(_is_linear(part, biased=False) for part in projections)
    linear = linear and all(_is_linear(part) for s in streams for part in (s.output, s.expand, s.contract))
    norms = all(_is_norm(part, width) for s in streams for part in (s.norm1, s.norm2))
    return linear and norms and width % 16 == 0 and all(x.shape[0] > 1 for x in states)


def _unhooked(part: nn.Module) -> bool:
    return not (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )


def _is_linear(part: nn.Module, biased: bool = True) -> bool:
    return (
        type(part) is nn.Linear
        and (part.bias is not None) == biased
        and part.out_features % 16 == 0
        and _unhooked(part)
        and is_plain(*part.parameters())
    )


def _is_norm(part: nn.Module, width: int) -> bool:
    return (
        type(part) is nn.BatchNorm1d
        and part.training
        and part.affine
        and part.track_running_stats
        and part.momentum is not None
        and part.num_features == width
        and _unhooked(part)
        and is_plain(*part.parameters(), part.running_mean, part.running_var)
    )


def layer_step(
    projections: Sequence[nn.Module], streams: Sequence[Stream], edges: Edges, h: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Apply a layer, where `fits` says yes.

    Shape:
        h and its result `[N, width]`; e and its result `[E, width]`, or None in the node variant.
    """
    given: list[Tensor] = [cast(Any, part).weight for part in projections]
    for output, norm1, expand, contract, norm2 in cast(Any, streams):
        for norm in (norm1, norm2):
            norm.num_batches_tracked.add_(1)
        given += output.weight, output.bias, norm1.weight, norm1.bias, expand.weight, expand.bias
        given += contract.weight, contract.bias, norm2.weight, norm2.bias
    out_h, out_e = _Layer.apply(edges, [(s.norm1, s.norm2) for s in streams], h, e, *given)
    return out_h, None if e is None else out_e


class _Weights:
    """A layer's parameters of both streams, as the loops take them; nodes' for edges where there are none."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        projections = 4 if len(given) > 3 + EACH else 3
        nodes, edges = given[projections:][:EACH], given[-EACH:]
        pairs = list(zip(nodes, edges, strict=True))
        output, output_bias, gain1, bias1, expand, expand_bias, contract, contract_bias, gain2, bias2 = pairs
        self.matrices = [*given[:projections], given[0]][:4] + [*output, *expand, *contract]
        self.vectors = [*output_bias, *expand_bias, *contract_bias, *gain1, *bias1, *gain2, *bias2]


class _Layer(torch.autograd.Function):
    """Streams are nodes and edges; in the node variant the second has no rows."""

    @staticmethod
    def forward(
        ctx: Any, edges: Edges, norms: Sequence[Sequence[Any]], h: Tensor, e: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        from manyheads.graph.models import graph_transformer_kernels as kernels

        weights = _Weights(given)
        x = [h.contiguous(), h[:0] if e is None else e.contiguous()]
        ends, (nodes, width) = _ends(edges), h.shape
        cuts, closed = kernels.cut(*(end.numpy() for end in ends[:2]), nodes)
        cuts[:, 1] *= e is not None
        parts = min(kernels.PARTS, len(cuts) - 1)
        pairs = [norms[0], norms[-1]]
        running = [y for pair in pairs for norm in pair for y in (norm.running_mean, norm.running_var)]
        numbers = np.array([[(n.eps, n.momentum) for n in pair] for pair in pairs])
        attended = edges.edge_index.shape[1] * edges.heads + 2 * nodes * edges.heads
        room = buffers.empty((6 * nodes + 4 * len(x[1]) + 16) * width + attended)
        out = [torch.empty_like(y) for y in x]
        sums, counts = [np.empty((parts, 2, width), np.float32) for _ in x], np.empty((2, parts), np.int64)
        turned = [w.t().contiguous() for w in weights.matrices]
        given = ends, _options(edges), edges.heads
        _together(
            kernels.forward, x, turned, weights.vectors, running, numbers, *given, room, out, sums, counts, cuts,
            closed,
        )  # fmt: skip
        ctx.edges, ctx.cuts, ctx.variant = given, (cuts, closed, parts), e is not None
        ctx.set_materialize_grads(False)  # nobody looks at the last layer's edges: they have no gradients
        ctx.save_for_backward(*x, *weights.matrices, *turned[6:8], *weights.vectors[2:4], room)
        return out[0], out[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, de: Tensor | None) -> tuple[Tensor | None, ...]:
        from manyheads.graph.models import graph_transformer_kernels as kernels

        *saved, room = ctx.saved_tensors
        x, weights, biases, (cuts, closed, parts) = saved[:2], saved[2:14], saved[14:], ctx.cuts
        grads = [torch.zeros_like(x[0]) if dh is None else dh.contiguous()]
        grads.append(x[1][:0] if de is None else de.contiguous())
        dx, (wide, width) = [torch.empty_like(y) for y in x], weights[6].shape
        totals = [room.new_empty(4, width) for _ in range(4)]
        shapes = [w.shape for w in weights[:10]] + [(1, wide)] * 2
        found = [room.new_empty(shape) for shape in shapes]
        rows = 2 * (len(grads[0]) + len(grads[1])) + 3 * len(x[0]) + len(x[1]) + 4 * parts
        size = rows * width + parts * sum(y.numel() for y in found)
        scratch = buffers.empty(size + 2 * ctx.edges[0][0].numel() * ctx.edges[2])
        _together(
            kernels.backward, grads, x, weights, biases, *ctx.edges, room, scratch, dx, totals, found, cuts, closed
        )
        gradients = [dx[0], dx[1] if ctx.variant else None, *found[: 3 + ctx.variant]]
        for i in range(1 + ctx.variant):
            gradients += _of_stream(i, found, totals) if len(grads[i]) else [None] * EACH
        return None, None, *gradients


def _of_stream(i: int, found: Sequence[Tensor], sums: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a stream's parameters; a bias before a batch norm has none: the norm takes it off again."""
    (bias1, gain1), (bias2, gain2) = sums[i][:2], sums[2 + i][:2]
    none = torch.zeros_like(bias1)
    expand = [found[6 + i], found[10 + i][0]]
    return [found[4 + i], none, gain1, bias1, *expand, found[8 + i], none.clone(), gain2, bias2]


def _ends(edges: Edges) -> tuple[Any, ...]:
    return (*edges.edge_index.long().contiguous().unbind(), *edges.order)


def _options(edges: Edges) -> tuple[np.float32, ...]:
    return np.float32(edges.scale), np.float32(edges.clamp), np.float32(edges.eps)


def _together(kernel: Any, *given: Any) -> None:
    from manyheads.core import crew
    from manyheads.graph.models.graph_transformer_kernels import PHASES

    parallel.together(partial(kernel, *map(_array, given), crew.slots(PHASES)))


def _array(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().numpy()
    return tuple(map(_array, x)) if isinstance(x, list | tuple) else x
