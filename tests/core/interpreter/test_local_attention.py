"""The Triton kernels of local attention in Triton's interpreter: forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops import local_attention
from manyheads.core.ops.local_attention.custom_op import local_attention_backward_op, local_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

CASES = {
    "one token": {"tokens": 1, "window": 3, "places": 1, "own": True},
    "band alone": {"tokens": 197, "window": 20, "batch": 1},
    "band, masked": {"tokens": 100, "window": 9, "masked": True},
    "a window of none": {"tokens": 63, "window": 0, "places": 1, "own": True},
    "one global token": {"tokens": 197, "window": 70, "places": 1, "own": True, "batch": 1},
    "rows of its own": {"tokens": 100, "window": 16, "places": 3},
    "places, masked": {
        "tokens": 100,
        "window": 9,
        "places": [[0, 5, 40], [44, -1, 7]],
        "own": True,
        "masked": True,
    },
    "more global tokens than a block": {"tokens": 63, "window": 4, "places": 20, "own": True, "batch": 1},
    "window beyond the ends": {"tokens": 70, "window": 300, "places": 2, "masked": True, "own": True},
    "an odd head dim": {"tokens": 63, "window": 5, "places": 1, "dim": 24, "own": True},
}


def forced():
    return use_backend("triton", op="local_attention")


@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, local_case):
    case = local_case(**CASES[name])
    with forced(), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("name", ["band alone", "places, masked"])
def test_float64_rule_in_half_precision(name, local_case):
    case = local_case(**CASES[name], dtype=torch.float16)
    with forced(), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


def test_a_sequence_of_padding_alone(local_case):
    q, k, v, _ = local_case(70, 8).inputs
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    with forced(), nan_filled_empties():
        out = local_attention(q, k, v, 8, global_tokens=1, mask=mask)
        grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert out[1].eq(0).all() and out[0].ne(0).all()
    assert all(g.isfinite().all() and g[1].eq(0).all() for g in grads)


def test_any_strides_and_nothing_at_all(local_case):
    case = local_case(100, 20, places=2, own=True)
    q, k, v, rows = case.inputs
    views = [x.requires_grad_() for x in torch.stack([x.detach() for x in (q, k, v)], 2).unbind(2)]
    turned = rows.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    wide = torch.stack([v.detach()] * 2, -1)[..., 0].requires_grad_()  # a last stride of 2 is copied
    with forced():
        assert_accurate(case.op, case.reference, views[0], views[1], wide, turned)
        for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
            none = torch.randn(shape, requires_grad=True)
            assert torch.autograd.grad(local_attention(none, none, none, 3).sum(), none)[0].shape == shape


def test_gradients_are_the_same_each_time(local_case):
    case = local_case(130, 20, places=2, own=True)
    with forced():
        first, second = (
            torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(local_case):
    q, k, v, rows = local_case(40, 3, places=2, own=True).inputs
    index, mask = torch.tensor([[0, 7], [3, -1]]), torch.rand(2, 40) > 0.2
    mask[:, [0, 3, 7]] = True
    check_op(local_attention_op, [q, k, v, index, mask, rows, 3, 0.3, "triton"])
    plain = [x.detach() for x in (q, k, v)]
    out, sums = local_attention_op(*plain, index, mask, rows.detach(), 3, 0.3, "triton")
    args = [torch.randn_like(out), *plain, index, mask, out, sums, 3, 0.3, "triton"]
    check_op(local_attention_backward_op, args)
