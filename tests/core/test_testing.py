"""The test helpers: each must fail where it should."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.testing import (
    assert_accurate,
    assert_within,
    check_gradients,
    check_op,
    nan_filled_empties,
)


def softmax(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def test_an_accurate_op_passes():
    x = torch.randn(63, 97, requires_grad=True)
    rows = assert_accurate(lambda x: torch.softmax(x, -1), softmax, x)
    assert [row.name for row in rows] == ["output 0", "grad 0"]
    assert all(row.baseline > 0 and row.scale > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("output 0", lambda x: torch.softmax(x, -1) * (1 + 1e-5)),
        ("output 0", lambda x: torch.softmax(x.half(), -1).float()),
        ("output 0", lambda x: torch.softmax(x, -1) * float("nan")),
        (
            "grad 0",
            lambda x: torch.softmax(x, -1).detach() + softmax(x) * 1.001 - softmax(x).detach() * 1.001,
        ),
    ],
)
def test_an_inaccurate_op_fails(name, wrong):
    x = torch.randn(63, 97, requires_grad=True)
    with pytest.raises(AssertionError, match=rf"{name}: .* FAILS"):
        assert_accurate(wrong, softmax, x)


def test_shapes_and_dtypes_are_compared():
    x = torch.randn(3, 4)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(lambda x: x[:1], lambda x: x, x)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(lambda x: x.half(), lambda x: x, x)


def test_several_outputs_and_absent_inputs():
    x, mask = torch.randn(5, 6, requires_grad=True), torch.rand(5, 6) > 0.5

    def op(x, mask, none):
        assert none is None and mask.dtype == torch.bool
        return x * mask, x.sum(-1)

    assert len(assert_accurate(op, op, x, mask, None)) == 3


def test_a_layout_is_kept():
    x = torch.randn(6, 5).t().requires_grad_()
    strides = []
    assert_accurate(lambda x: strides.append(x.stride()) or x * 2, lambda x: x * 2, x)
    assert strides == [(1, 5)]


def test_nan_filled_empties():
    x = torch.ones(2)
    before = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    with nan_filled_empties():
        made = [torch.empty(3), torch.empty_like(x), torch.empty_strided((2,), (1,)), x.new_empty(2)]
        whole = torch.empty(2, dtype=torch.int8)
    assert all(m.isnan().all() for m in made) and whole.eq(-128).all()
    assert (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty) == before
    with pytest.raises(ValueError), nan_filled_empties():
        raise ValueError
    assert torch.empty is before[0]


def test_check_gradients():
    check_gradients(lambda x: x.square(), torch.randn(3))
    with pytest.raises((AssertionError, RuntimeError)):
        check_gradients(lambda x: x.square().detach() + x - x.detach(), torch.randn(3))


@torch.library.custom_op("manyheads_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return x.new_empty((*x.shape, 1))


def test_check_op():
    with pytest.raises(AssertionError, match="opcheck"):
        check_op(double, [torch.randn(3)])


def test_within_is_a_share_of_the_largest_value():
    want = torch.tensor([0.0, 100.0])
    assert_within(want + 0.9, want, 0.01)
    for wrong, message in ((want + 1.1, "off by"), (want + float("nan"), "off by"), (want[:1], "shape")):
        with pytest.raises(AssertionError, match=message):
            assert_within(wrong, want, 0.01)
