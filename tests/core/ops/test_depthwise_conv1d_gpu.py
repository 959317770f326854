"""The Triton kernels of the depthwise convolution on a GPU: float32, float16, bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.depthwise_conv1d import custom_op, depthwise_conv1d
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = ["state, silu", "state reverse", "centred, silu", "centred reverse"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 11, 17, 31, 39])
@pytest.mark.parametrize("form", FORMS)
def test_float64_rule(form, width, dtype, conv_case):
    for length, dim in ((1, 8), (63, 24), (197, 100), (1000, 256)):
        case = conv_case(form, length, dim, width, dtype=dtype, device="cuda")
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 4, 17])
@pytest.mark.parametrize("form", FORMS)
def test_packed(form, width, dtype, conv_case):
    bounds = [0, 1, 1, 4, 63, 500, 1000]
    for dim in (16, 40, 384):
        case = conv_case(form, 1000, dim, width, cu_seqlens=bounds, dtype=dtype, device="cuda")
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("width", [4, 31])
def test_long_sums_are_exact_and_the_same_each_time(width, conv_case):
    case = conv_case("causal, silu", 20000, 64, width, device="cuda")
    with use_backend("triton"):
        assert_accurate(case.op, case.reference, *case.inputs)
        first, second = (
            torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dispatch_and_custom_op(conv_case):
    assert choose("depthwise_conv1d", device="cuda", dtype=torch.bfloat16).backend == "triton"
    case = conv_case("causal, silu", 63, 24, 4, device="cuda")
    check_op(custom_op.convolve, (*case.inputs, None, None, 3, True, "triton"))


def test_more_than_32_bits_of_offsets():
    """Tokens beyond the 2^31st entry."""
    x = torch.zeros(1, 2**22 + 100, 520, device="cuda", dtype=torch.bfloat16)
    x[:, -50:] = torch.randn(50, 520, device="cuda").bfloat16()
    weight = torch.randn(520, 4, device="cuda")
    tail = x[:, -60:].clone()
    with torch.no_grad(), use_backend("triton"):
        found = depthwise_conv1d(x, weight)[:, -50:]
    with use_backend("reference"):
        want = depthwise_conv1d(tail, weight)[:, -50:]
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
