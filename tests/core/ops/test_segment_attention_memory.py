"""Segment attention holds nothing per edge, head and channel: what training keeps and makes, counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.core.dispatch import use_backend
from manyheads.core.ops import edge_order, segment_attention

NODES, EDGES, HEADS = 50, 4000, 4


class Made(TorchDispatchMode):
    """Collect the sizes of all tensors that ops make; the compiled loops' own scratch is of 32 edges."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(one.alias_info is not None for one in func._schema.returns)
        if isinstance(out, torch.Tensor) and not views:
            self.sizes.append(out.numel())
        return out


def train(dim: int, edge: bool) -> tuple[int, list[int]]:
    """Numbers kept for the backward but given by the caller, and the sizes of all that a step makes."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(0, NODES, (2, EDGES), generator=generator)
    shapes = [(NODES, HEADS, dim)] * 3 + ([(EDGES, HEADS, dim)] if edge else [])
    given = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    order = edge_order(edge_index, NODES)
    known = {x.data_ptr() for x in (*given, edge_index, *order)}
    kept = []

    def keep(x):
        if x.data_ptr() not in known:
            kept.append(x.numel())
        return x

    options = {"edge": given[3], "return_edge": True, "clamp": 5.0} if edge else {}
    with use_backend("numba"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Made() as made:
        out = segment_attention(*given[:3], edge_index, order=order, **options)
        out = out if edge else (out,)
        torch.autograd.grad(out, given, [torch.ones_like(x) for x in out])
    return sum(kept), made.sizes


@pytest.mark.parametrize("dim", [8, 64])
def test_nothing_is_per_edge_head_and_channel(dim):
    """Kept are the output, a number per edge and head, and two per node and head; and nothing larger made."""
    kept, made = train(dim, edge=False)
    assert kept == NODES * HEADS * dim + EDGES * HEADS + 2 * NODES * HEADS
    assert made and max(made) <= max(EDGES * HEADS, NODES * HEADS * dim) < EDGES * HEADS * dim


@pytest.mark.parametrize("dim", [8, 64])
def test_edge_channels_are_the_only_rows_of_edges(dim):
    """With edge channels three: the edge output, what it is pulled by, and the channels' gradient."""
    kept, made = train(dim, edge=True)
    assert kept == NODES * HEADS * dim + EDGES * HEADS + 2 * NODES * HEADS
    large = [size for size in made if size > max(EDGES * HEADS, NODES * HEADS * dim)]
    assert large == [EDGES * HEADS * dim] * 3
