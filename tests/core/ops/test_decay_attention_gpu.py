"""The Triton kernels of linear attention with decay on a GPU, in three dtypes (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.decay_attention import decay_attention, reference
from manyheads.core.ops.decay_attention.custom_op import decay_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(length: int, vector: bool, dtype: torch.dtype, *, dim: int = 64, width: int = 64) -> list[Tensor]:
    shapes = [(2, length, 2, dim), (2, length, 2, dim), (2, length, 4, width)]
    decay = -F.softplus(torch.randn(2, length, 4, *([dim] if vector else [])))
    given = [*(torch.randn(shape) for shape in shapes), decay, torch.randn(2, 4, dim, width)]
    return [x.to("cuda", dtype).requires_grad_() for x in given]


def bind(function, **options):
    return lambda q, k, v, g, s: function(q, k, v, g, initial_state=s, return_state=True, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float64_rule(dtype, vector, reverse):
    for length, dim, width in ((197, 64, 64), (63, 24, 100), (128, 128, 128)):
        given = inputs(length, vector, dtype, dim=dim, width=width)
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(
                bind(decay_attention, reverse=reverse),
                bind(reference.decay_attention, reverse=reverse),
                *given,
            )


@pytest.mark.parametrize("vector", [False, True])
def test_packed_equals_one_by_one(vector):
    given = [x.detach()[:1] for x in inputs(300, vector, torch.float32)[:4]]
    bounds = torch.tensor([0, 1, 1, 130, 300], dtype=torch.int32, device="cuda")
    with use_backend("triton"):
        whole = decay_attention(*given, cu_seqlens=bounds)
        for a, b in ((0, 1), (1, 130), (130, 300)):
            alone = decay_attention(*(x[:, a:b] for x in given))
            torch.testing.assert_close(whole[:, a:b], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vector", [False, True])
def test_gradients_are_the_same_each_time(vector):
    given = inputs(500, vector, torch.bfloat16)
    first, second = (
        torch.autograd.grad(decay_attention(*given[:4]).float().square().sum(), given[:4]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    q, k, v, g, state = inputs(20, False, torch.float32)
    check_op(decay_attention_op, (q, k, v, g, state, None, 0.3, False, "triton"))
