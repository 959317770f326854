"""A layer of the Graph Transformer in training on a CPU, as one step of autograd.

Torch goes through a layer in some sixty operations, each of which reads and writes all rows and waits for its
threads. Compiled loops (`graph_transformer_kernels`) take blocks of rows through several of them while they lie
in the cache, and threads are woken once. They ask for whole vectors and for CPUs on which PyTorch's own products
leave these unused (`core.products`); elsewhere, and with dropout or other norms, the layer is its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manyheads.core import parallel
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
    """A layer's parameters by what they do, of both streams; nodes' for edges where there are none."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        projections = 4 if len(given) > 3 + EACH else 3
        self.inward = [*given[:projections], given[0]][:4]
        each = [given[i:][:EACH] for i in (projections, len(given) - EACH)]
        self.output, self.output_bias, gain1, bias1, self.expand, self.expand_bias = _columns(each, 0, 6)
        self.contract, self.contract_bias, gain2, bias2 = _columns(each, 6, EACH)
        self.norm1, self.norm2 = list(zip(gain1, bias1, strict=True)), list(zip(gain2, bias2, strict=True))


def _columns(rows: Sequence[Sequence[Tensor]], first: int, last: int) -> list[list[Tensor]]:
    return [[row[i] for row in rows] for i in range(first, last)]


class _Layer(torch.autograd.Function):
    """Streams are nodes and edges; in the node variant the second has no rows."""

    @staticmethod
    def forward(
        ctx: Any, edges: Edges, norms: Sequence[Sequence[Any]], h: Tensor, e: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        from manyheads.graph.models import graph_transformer_kernels as kernels

        weights = _Weights(given)
        x = [h.contiguous(), h[:0] if e is None else e.contiguous()]
        ends, options = _ends(edges), _options(edges)
        cuts, closed = kernels.cut(*(end.numpy() for end in ends[:2]), len(h))
        cuts[:, 1] *= e is not None
        parts = min(kernels.PARTS, len(cuts) - 1)
        projected = [_like(y, len(w)) for y, w in zip([x[0]] * 3 + [x[1]], weights.inward, strict=True)]
        mixed, total, second, out = ([_like(y, h.shape[1]) for y in x] for _ in range(4))
        attended = [h.new_empty(edges.edge_index.shape[1], edges.heads), h.new_empty(len(h), 2, edges.heads)]
        shifts = [[torch.stack([g, b, g, b]) for g, b in each] for each in (weights.norm1, weights.norm2)]
        pairs = [norms[0], norms[-1]]
        running = [y for pair in pairs for norm in pair for y in (norm.running_mean, norm.running_var)]
        numbers = torch.tensor([[[n.eps, n.momentum] for n in pair] for pair in pairs], dtype=torch.float64)
        sums, counts = [h.new_empty(parts, 2, h.shape[1]) for _ in x], np.empty((2, parts), np.int64)
        output = [*_turned(weights.output), *_rows(weights.output_bias)]
        turned = [*_turned(weights.expand), *_rows(weights.expand_bias)]
        inner = [*turned, *_turned(weights.contract), *_rows(weights.contract_bias)]
        _together(
            kernels.forward, x, _turned(weights.inward), projected, mixed, ends, options, *attended, output,
            inner, *shifts, running, numbers, total, second, out, sums, counts, cuts, closed,
        )  # fmt: skip
        ctx.edges, ctx.cuts, ctx.variant = (ends, options), (cuts, closed, parts), e is not None
        ctx.set_materialize_grads(False)  # nobody looks at the last layer's edges: they have no gradients
        kept = (x, weights.inward, projected, mixed, attended, weights.output, weights.expand + weights.contract,
                turned, *shifts, total, second)  # fmt: skip
        ctx.sizes = [len(group) for group in kept]
        ctx.save_for_backward(*chain.from_iterable(kept))
        return out[0], out[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, de: Tensor | None) -> tuple[Tensor | None, ...]:
        from manyheads.graph.models import graph_transformer_kernels as kernels

        saved, (cuts, closed, parts) = iter(ctx.saved_tensors), ctx.cuts
        kept = [list(islice(saved, size)) for size in ctx.sizes]
        x, inward, projected, mixed, attended, output, inner, turned, *shifts, total, second = kept
        grads = [torch.zeros_like(x[0]) if dh is None else dh.contiguous()]
        grads.append(x[1][:0] if de is None else de.contiguous())
        dz, dmixed = ([torch.empty_like(g) for g in grads] for _ in range(2))
        dprojected, dx = [torch.empty_like(y) for y in projected], [torch.empty_like(y) for y in x]
        dlogits = [torch.empty_like(attended[0]) for _ in range(2)]
        sums = [x[0].new_empty(parts, 2, x[0].shape[1]) for _ in x]
        totals = [x[0].new_zeros(4, x[0].shape[1]) for _ in range(4)]
        shapes = [w.shape for w in (*inward, *output, *inner)] + [(1, w.shape[0]) for w in inner[:2]]
        dweights = [x[0].new_empty(parts, *shape) for shape in shapes]
        found = [x[0].new_empty(shape) for shape in shapes]
        _together(
            kernels.backward, grads, x, inward, projected, mixed, *ctx.edges, *attended, output, inner, turned,
            *shifts, total, second, dz, dmixed, dprojected, dlogits, dx, sums, totals, dweights, found, cuts,
            closed,
        )  # fmt: skip
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


def _like(x: Tensor, width: int) -> Tensor:
    return x.new_empty(len(x), width)


def _turned(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.t().contiguous() for w in weights]


def _rows(biases: Sequence[Tensor]) -> list[Tensor]:
    return [bias[None] for bias in biases]


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
