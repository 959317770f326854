"""The Triton kernels of local attention on a GPU: float32, float16 and bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.local_attention.custom_op import local_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "one token": {"tokens": 1, "window": 3, "places": 1, "own": True},
    "band alone": {"tokens": 400, "window": 20},
    "band, masked": {"tokens": 197, "window": 9, "masked": True},
    "one global token": {"tokens": 400, "window": 64, "places": 1, "own": True},
    "rows of its own": {"tokens": 197, "window": 16, "places": 3},
    "places, masked": {
        "tokens": 100, "window": 9, "places": [[0, 5, 40], [44, -1, 7]], "own": True, "masked": True,
    },
    "more global tokens than a block": {"tokens": 63, "window": 4, "places": 20, "own": True},
    "odd head dim": {"tokens": 63, "window": 5, "places": 1, "dim": 24, "own": True},
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype, local_case):
    case = local_case(**CASES[name], dtype=dtype, device="cuda")
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_every_row_of_the_table(dim, dtype, local_case):
    if dim == 256 and dtype == torch.float32:
        pytest.skip("float32 stops at 128")
    for options in ({}, {"masked": True}, {"places": 2, "own": True}):
        case = local_case(300, 40, dim=dim, dtype=dtype, device="cuda", **options)
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


def test_gradients_are_the_same_each_time(local_case):
    case = local_case(500, 64, places=2, own=True, heads=8, dim=64, dtype=torch.bfloat16, device="cuda")
    first, second = (
        torch.autograd.grad(case.op(*case.inputs).float().square().sum(), case.inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_custom_op(local_case):
    q, k, v, rows = local_case(100, 9, places=2, own=True, device="cuda").inputs
    index = torch.tensor([[0, 7], [3, -1]], device="cuda")
    check_op(local_attention_op, [q, k, v, index, None, rows, 9, 0.25, "triton"])
