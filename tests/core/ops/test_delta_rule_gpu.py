"""The Triton kernels of the delta rule on a GPU, in every dtype (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.delta_rule import delta_rule, reference
from manyheads.core.testing import assert_accurate, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_precision():
    """The plain formula it is compared with must not round its products to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(length: int, key: int, value: int, dtype: torch.dtype, states: int = 2) -> list[Tensor]:
    batch, heads = (2 if states == 2 else 1), 3
    drawn = [
        torch.randn(batch, length, heads, key),
        F.normalize(torch.randn(batch, length, heads, key), dim=-1),
        torch.randn(batch, length, heads, value),
        torch.rand(batch, length, heads),
        F.logsigmoid(torch.randn(batch, length, heads) + 2),
        0.3 * torch.randn(states, heads, key, value),
    ]
    return [x.to("cuda", dtype).requires_grad_() for x in drawn]


def full(function, **options):
    return lambda q, k, v, beta, decay, state: function(
        q, k, v, beta, log_decay=decay, initial_state=state, return_state=True, **options
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("length", "key", "value"), [(63, 16, 20), (197, 32, 64), (100, 64, 64), (70, 48, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float64_rule(dtype, length, key, value, gated):
    q, k, v, beta, decay, state = inputs(length, key, value, dtype)
    given = (q, k, v, beta, decay if gated else None, state)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(full(delta_rule), full(reference.delta_rule), *given)


def test_packed_and_the_same_each_time():
    given = inputs(200, 64, 64, torch.bfloat16, states=4)
    bounds = torch.tensor([0, 33, 33, 34, 200], dtype=torch.int32, device="cuda")
    run = full(delta_rule, cu_seqlens=bounds)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(run, full(reference.delta_rule, cu_seqlens=bounds), *given)
        first, second = (torch.autograd.grad(run(*given)[0].float().square().sum(), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
