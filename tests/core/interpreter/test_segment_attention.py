"""The Triton kernels of segment attention in Triton's interpreter (test_interpreter.py starts it)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.segment_attention import edge_order, reference, segment_attention
from manyheads.core.ops.segment_attention.custom_op import segment_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

GRAPH_TRANSFORMER = {"clamp": 1.0, "eps": 1e-6, "return_edge": True}


def graph(nodes: int, edges: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, nodes, (edges,), generator=generator)
    return torch.stack([source, torch.randint(0, max(1, nodes - 1), (edges,), generator=generator)])


def inputs(nodes: int, edges: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(n, heads, dim).to(dtype).requires_grad_() for n in (nodes, nodes, nodes, edges)]


def bound(function, edge_index, **options):
    return lambda q, k, v, edge=None: function(q, k, v, edge_index, edge=edge, **options)


@pytest.mark.parametrize("options", [{}, GRAPH_TRANSFORMER], ids=["softmax", "clamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("nodes", "edges", "heads", "dim"), [(1, 1, 1, 1), (63, 130, 2, 8), (197, 300, 1, 10), (9, 40, 2, 100)]
)
def test_float64_rule(nodes, edges, heads, dim, dtype, options):
    edge_index = graph(nodes, edges)
    q, k, v, edge = inputs(nodes, edges, heads, dim, dtype)
    ours = bound(segment_attention, edge_index, **options)
    plain = bound(reference.segment_attention, edge_index, **options)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(ours, plain, q, k, v, edge)
        assert_accurate(ours, plain, q, k, v)


def test_strides_and_integers():
    edge_index = graph(20, 50).int()
    q, k, v = (x.requires_grad_() for x in torch.randn(20, 3, 2, 4).unbind(1))
    edge = torch.randn(4, 50, 2).permute(1, 2, 0).requires_grad_()
    with use_backend("triton"), nan_filled_empties():
        ours = bound(segment_attention, edge_index, **GRAPH_TRANSFORMER)
        assert_accurate(
            ours, bound(reference.segment_attention, edge_index, **GRAPH_TRANSFORMER), q, k, v, edge
        )


def test_no_edges_and_no_nodes():
    nothing = torch.empty(2, 0, dtype=torch.int64)
    q, k, v, edge = inputs(5, 0, 2, 4)
    with use_backend("triton"), nan_filled_empties():
        for options in ({}, {"clamp": 5.0}):
            out = segment_attention(q, k, v, nothing, edge=edge, **options)
            assert out.eq(0).all()
            assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
        empty = [x.detach()[:0] for x in (q, k, v)]
        assert segment_attention(*empty, nothing).shape == (0, 2, 4)


def test_large_logits_and_nan():
    edge_index = graph(30, 90)
    q, k, v, _ = (x.detach() * 30 for x in inputs(30, 90, 1, 8))
    with use_backend("triton"):
        out = segment_attention(q, k, v, edge_index)
        truth = reference.segment_attention(q.double(), k.double(), v.double(), edge_index)
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-3)
        k[edge_index[0, 0]] = float("nan")
        for options in ({}, {"clamp": 5.0}):
            assert segment_attention(q, k, v, edge_index, **options)[edge_index[1, 0]].isnan().all()


def test_opcheck():
    edge_index = graph(7, 12)
    order = list(edge_order(edge_index, 7))
    check_op(
        segment_attention_op,
        (*inputs(7, 12, 1, 4), edge_index, order, [0.5, 5.0, 1e-6], True, "triton"),
    )


def test_the_widest_head():
    with use_backend("triton"), pytest.raises(UsageError, match="at most 128"):
        segment_attention(*inputs(3, 2, 1, 129)[:3], graph(3, 2))
