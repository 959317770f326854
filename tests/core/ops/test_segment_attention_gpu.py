"""The Triton kernels of segment attention on a GPU, in every dtype (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.segment_attention import reference, segment_attention
from manyheads.core.testing import assert_accurate, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"clamp": 1.0, "eps": 1e-6, "return_edge": True}], ids=str)
@pytest.mark.parametrize("dim", [8, 10, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float64_rule(dtype, dim, options):
    nodes, edges, heads = 400, 1500, 4
    edge_index = torch.randint(0, nodes - 1, (2, edges), device="cuda")
    given = [
        torch.randn(n, heads, dim, device="cuda").to(dtype).requires_grad_()
        for n in (nodes, nodes, nodes, edges)
    ]

    def bound(function):
        return lambda q, k, v, edge=None: function(q, k, v, edge_index, edge=edge, **options)

    with use_backend("triton"), nan_filled_empties():
        assert_accurate(bound(segment_attention), bound(reference.segment_attention), *given)
        assert_accurate(bound(segment_attention), bound(reference.segment_attention), *given[:3])


def test_gradients_are_the_same_each_time():
    edge_index = torch.randint(0, 3000, (2, 9000), device="cuda")
    given = [torch.randn(n, 8, 8, device="cuda").requires_grad_() for n in (3000, 3000, 3000, 9000)]

    def run():
        out = segment_attention(*given[:3], edge_index, edge=given[3], clamp=5.0)
        return torch.autograd.grad(out.square().sum(), given)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
