"""The Triton kernels of packed attention on a GPU: float32, float16 and bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.varlen_attention.custom_op import varlen_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ODD = [1, 63, 0, 100, 197]
CASES = {
    "plain": {"queries": ODD},
    "causal": {"queries": ODD, "causal": True},
    "groups, near bias": {"queries": ODD, "heads": 4, "key_heads": 2, "far": 5},
    "far bias": {"queries": ODD, "far": 150},
    "causal bias": {"queries": ODD, "far": 20, "causal": True},
    "other lengths": {"queries": [5, 0, 70, 33], "keys": [150, 4, 63, 0], "far": 40},
    "other lengths, causal": {"queries": [70, 33], "keys": [50, 90], "far": 8, "causal": True},
    "odd head dim": {"queries": [63, 100], "dim": 24, "far": 3},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype, varlen_case):
    case = varlen_case(**CASES[name], dtype=dtype, device="cuda")
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_every_row_of_the_table(dim, dtype, varlen_case):
    if dim == 256 and dtype == torch.float32:
        pytest.skip("float32 stops at 128")
    for options in ({}, {"far": 9}, {"causal": True}, {"far": 9, "causal": True}):
        case = varlen_case(ODD, dim=dim, dtype=dtype, device="cuda", **options)
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


def test_gradients_are_the_same_each_time(varlen_case):
    case = varlen_case(ODD * 8, heads=8, dim=64, far=30, dtype=torch.bfloat16, device="cuda")
    first, second = (
        torch.autograd.grad(case.op(*case.inputs).float().square().sum(), case.inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_custom_op(varlen_case):
    q, k, v, bias = varlen_case([63, 100], far=3, device="cuda").inputs
    cu = torch.tensor([0, 63, 163], dtype=torch.int32, device="cuda")
    check_op(varlen_attention_op, [q, k, v, cu, cu, bias, True, 0.25, "triton"])
