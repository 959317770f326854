"""The Triton kernels of the delta rule on a GPU, in every dtype (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.delta_rule import delta_rule, reference
from manyheads.core.testing import assert_accurate, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def full(function, **options):
    return lambda q, k, v, beta, decay, state: function(
        q, k, v, beta, log_decay=decay, initial_state=state, return_state=True, **options
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("length", "key", "value"), [(63, 16, 20), (197, 32, 64), (100, 64, 64), (70, 48, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float64_rule(dtype, length, key, value, gated, delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(2, length, 3, key, value, dtype=dtype, device="cuda")
    given = (q, k, v, beta, decay if gated else None, state)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(full(delta_rule), full(reference.delta_rule), *given)


def test_packed_and_the_same_each_time(delta_inputs):
    given = delta_inputs(1, 200, 3, 64, 64, states=4, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, 33, 33, 34, 200], dtype=torch.int32, device="cuda")
    run = full(delta_rule, cu_seqlens=bounds)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(run, full(reference.delta_rule, cu_seqlens=bounds), *given)
        first, second = (torch.autograd.grad(run(*given)[0].float().square().sum(), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
