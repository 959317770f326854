"""Layers of the Graph Transformer in training on a CPU, all of them as one step of autograd.

Torch goes through a layer in some sixty operations, each of which reads and writes all rows and waits for
its threads. Compiled loops (`graph_transformer_kernels`) take blocks of rows through several of them while
they lie in the cache, and threads are woken once. They ask for whole vectors and for CPUs on which PyTorch's
own products leave these unused (`core.products`); elsewhere, and with dropout or other norms, a layer is its
modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from manyheads.core import buffers, parallel
from manyheads.core.dispatch import numba_installed
from manyheads.core.ops import EdgeOrder
from manyheads.core.products import is_plain, wide_vectors_unused


class Stream(NamedTuple):
    """The layers behind the attention, of nodes or edges."""

    output: nn.Module
    norm1: nn.Module
    expand: nn.Module
    contract: nn.Module
    norm2: nn.Module


class Layer(NamedTuple):
    """A layer: the projections of queries, keys, values and perhaps edges; what is behind, of each stream."""

    projections: Sequence[nn.Module]
    streams: Sequence[Stream]


class Edges(NamedTuple):
    """A graph's edges and what the attention does with them."""

    edge_index: Tensor
    order: EdgeOrder
    heads: int
    scale: float
    clamp: float
    eps: float


def fits(layers: Sequence[Layer], *states: Tensor) -> bool:
    """Tell whether `layers_step` can run: plain layers in training, whole vectors, the right CPU.

    Args:
        layers: Alike, but for their numbers.
        states: Of nodes and perhaps edges.
    """
    if not (is_plain(*states) and wide_vectors_unused() and numba_installed() and torch.is_grad_enabled()):
        return False
    width = states[0].shape[1]
    whole = width % 16 == 0 and all(x.shape[0] > 1 for x in states)
    return whole and all(_is_plain(layer, width) for layer in layers)


def _is_plain(layer: Layer, width: int) -> bool:
    return all(_is_linear(part, biased=False) for part in layer.projections) and all(
        _is_linear(s.output) and _is_linear(s.expand) and _is_linear(s.contract)
        and _is_norm(s.norm1, width) and _is_norm(s.norm2, width)
        for s in layer.streams
    )  # fmt: skip


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
        and is_plain(part.weight, part.bias)
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
        and is_plain(part.weight, part.bias, part.running_mean, part.running_var)
    )


def layers_step(
    layers: Sequence[Layer], edges: Edges, h: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Apply layers one after another, where `fits` says yes.

    Shape:
        h and its result `[N, width]`; e and its result `[E, width]`, or None in the node variant.
    """
    norms: list[Any] = [n for layer in layers for s in layer.streams for n in (s.norm1, s.norm2)]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    given = [tensor for layer in layers for tensor in _parameters(layer)]
    out_h, out_e = _Layers.apply(edges, len(layers), norms, h, e, *given)
    return out_h, None if e is None else out_e


def _parameters(layer: Layer) -> list[Tensor]:
    """A layer's parameters as the loops have them: each of nodes, then edges; nodes' where there are none."""
    projections, streams = cast(Any, layer)
    both = streams[0], streams[-1]
    parts = [
        (s.output.bias, s.contract.bias, s.norm1.weight, s.norm1.bias, s.norm2.weight, s.norm2.bias)
        for s in both
    ]
    return [
        *(part.weight for part in projections), *(() if len(projections) == 4 else (projections[0].weight,)),
        *(s.output.weight for s in both), *(s.expand.weight for s in both),
        *(s.contract.weight for s in both), *(s.expand.bias for s in both),
        *chain.from_iterable(zip(*parts, strict=True)),
    ]  # fmt: skip


class _Layers(torch.autograd.Function):
    """Streams are nodes and edges; in the node variant the second has no rows."""

    @staticmethod
    def forward(
        ctx: Any, edges: Edges, count: int, norms: Sequence[Any], h: Tensor, e: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        from manyheads.graph.models import graph_transformer_kernels as kernels
        from manyheads.graph.models.graph_transformer_memory import room_size

        x = [h.contiguous(), h[:0] if e is None else e.contiguous()]
        ends, (width, wide) = _ends(edges), given[8].shape
        cuts, closed = kernels.cut(ends[0].numpy(), ends[1].numpy(), len(h))
        cuts[:, 1] *= e is not None
        parts = min(kernels.PARTS, len(cuts) - 1)
        flat = _flatten_dense_tensors(given).view(count, -1)
        moved = [x for norm in norms for x in (norm.running_mean, norm.running_var)]
        running = _flatten_dense_tensors(moved).view(count, -1, 2, 2, width)
        numbers = np.array([(n.eps, n.momentum) for n in norms]).reshape(count, -1, 2, 2)
        rooms = buffers.empty(count * room_size(_rows(x), width, wide, len(edges.order.into), edges.heads))
        rooms = rooms.view(count, -1)
        out = [torch.empty_like(y) for y in x]
        sums, counts = [np.empty((parts, 2, width), np.float32) for _ in x], np.empty((2, parts), np.int64)
        fixed = wide, ends, _options(edges), edges.heads
        _together(
            kernels.forward, count, *x, flat, wide, running, numbers, *fixed[1:], rooms, out, sums, counts,
            cuts, closed,
        )  # fmt: skip
        torch._foreach_copy_(moved, list(_unflatten_dense_tensors(running.view(-1), moved)))
        ctx.fixed, ctx.cuts, ctx.variant = fixed, (cuts, closed, parts), e is not None
        ctx.set_materialize_grads(False)  # nobody looks at the last layer's edges: they have no gradients
        ctx.save_for_backward(*x, flat, rooms, *given[: len(given) // count])
        return out[0], out[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, de: Tensor | None) -> tuple[Tensor | None, ...]:
        from manyheads.graph.models.graph_transformer_backward import backward
        from manyheads.graph.models.graph_transformer_memory import scratch_size

        (h, e, flat, rooms, *given), (cuts, closed, parts) = ctx.saved_tensors, ctx.cuts
        wide, ends, _, heads = ctx.fixed
        dh = torch.zeros_like(h) if dh is None else dh.contiguous()
        dx, dflat = [torch.empty_like(y) for y in (h, e)], torch.empty_like(flat)
        room = buffers.empty(scratch_size((len(h), len(e)), h.shape[1], wide, ends[0].numel(), heads, parts))
        _together(
            backward, len(flat), dh, e[:0] if de is None else de.contiguous(), h, e, flat, *ctx.fixed, rooms,
            room, dx, dflat, cuts, closed,
        )  # fmt: skip
        found: list[list[Tensor | None]] = [list(_unflatten_dense_tensors(layer, given)) for layer in dflat]
        for layer in found if not ctx.variant else found[-1:] if de is None else []:
            layer[5::2] = [None] * len(layer[5::2])  # of the edges' stream
            layer[3] = layer[3] if ctx.variant else None
        return None, None, None, dx[0], dx[1] if ctx.variant else None, *chain.from_iterable(found)


def _rows(x: Sequence[Tensor]) -> tuple[int, int]:
    return len(x[0]), len(x[1])


def _ends(edges: Edges) -> tuple[Any, ...]:
    return (*edges.edge_index.long().contiguous().unbind(), *edges.order)


def _options(edges: Edges) -> tuple[np.float32, ...]:
    return np.float32(edges.scale), np.float32(edges.clamp), np.float32(edges.eps)


def _together(kernel: Any, layers: int, *given: Any) -> None:
    from manyheads.core import crew
    from manyheads.graph.models.graph_transformer_kernels import PHASES

    parallel.together(partial(kernel, *map(_array, given), crew.slots(PHASES * layers)))


def _array(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().numpy()
    return tuple(map(_array, x)) if isinstance(x, list | tuple) else x
