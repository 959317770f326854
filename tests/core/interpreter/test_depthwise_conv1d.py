"""The Triton kernels of the depthwise convolution in Triton's interpreter: forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops.depthwise_conv1d import custom_op, depthwise_conv1d
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

FORMS = ["state", "state, silu", "state reverse, silu", "centred", "centred reverse, silu", "reverse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("form", "length", "dim", "width"),
    [
        ("state, silu", 1, 3, 4),
        ("state, silu", 63, 20, 4),
        ("state reverse, silu", 100, 5, 3),
        ("centred, silu", 63, 130, 7),
        ("centred", 100, 20, 11),
        ("state", 63, 9, 17),
        ("state reverse", 100, 9, 31),
        ("centred", 63, 40, 39),
        ("causal", 63, 20, 1),
        ("state, silu", 63, 20, 2),
    ],
)
def test_float64_rule(form, length, dim, width, dtype, conv_case):
    case = conv_case(form, length, dim, width, dtype=dtype)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [3, 6])
def test_packed(form, width, conv_case):
    case = conv_case(form, 70, 20, width, cu_seqlens=[0, 1, 1, 4, 50, 70])
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("width", [4, 7])
def test_programs_walk_over_several_tiles(width, conv_case, monkeypatch):
    """Three programs over more tiles: the loop, the ragged last one, the two-stage sum, twice the same."""
    from manyheads.core.ops.depthwise_conv1d import triton

    for table in (triton._TABLE, triton._SHORT_TABLE):
        monkeypatch.setitem(table, 32, triton.Config(16, 32, 4, programs=3))
    case = conv_case("state, silu", 40, 20, width)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)
        grads = [torch.autograd.grad(case.op(*case.inputs)[0].square().sum(), case.inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_strides_mixed_dtypes_and_inputs_without_gradient(conv_case):
    case = conv_case("state, silu", 30, 24, 4)
    x, weight, bias, state = (t.detach() for t in case.inputs)
    wide = torch.cat([x, x + 1], -1)[..., 24:].requires_grad_()
    crossed = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    half = x.half().requires_grad_()
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, wide, weight, bias, state)
        assert_accurate(
            case.op, case.reference, crossed, weight.requires_grad_(), bias.requires_grad_(), state
        )
        assert_accurate(case.op, case.reference, half, weight, bias, state.half().requires_grad_())
        y = depthwise_conv1d(wide, weight)  # a gradient of stride zero
        found = torch.autograd.grad(y.sum(), (wide, weight))
    with use_backend("reference"):
        wanted = torch.autograd.grad(depthwise_conv1d(wide, weight).sum(), (wide, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_values_through_silu():
    x = torch.tensor([-200.0, -90, -1, 0, 1, 90, 200]).reshape(1, 7, 1).requires_grad_()
    with use_backend("triton"):
        y = depthwise_conv1d(x, torch.ones(1, 1), activation="silu")
    want = torch.nn.functional.silu(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


def test_opcheck(conv_case):
    case = conv_case("state, silu", 7, 5, 4)
    x, weight, bias, state = case.inputs
    past = state.detach().transpose(1, 2).contiguous().requires_grad_()
    check_op(custom_op.convolve, (x, weight, bias, past, None, 3, True, "triton"))
