"""The Triton kernels of packed attention in Triton's interpreter: forward and every gradient."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops import varlen_attention
from manyheads.core.ops.varlen_attention.custom_op import varlen_attention_backward_op, varlen_attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

CASES = {
    "odd lengths": {"queries": [1, 63, 0, 100]},
    "causal": {"queries": [1, 63, 0, 100], "causal": True},
    "groups, near bias": {"queries": [63, 20], "heads": 4, "key_heads": 2, "far": 5},
    "bias over several blocks": {"queries": [197], "heads": 1, "far": 70},
    "bias with tails on both sides": {"queries": [300, 10], "heads": 1, "far": 3},
    "causal bias": {"queries": [100, 1, 70], "far": 20, "causal": True},
    "other lengths of keys": {"queries": [5, 0, 70, 33], "keys": [9, 4, 63, 0]},
    "more keys, bias": {"queries": [5, 0, 70], "keys": [150, 4, 63], "far": 40},
    "more queries, bias": {"queries": [150], "keys": [9], "heads": 1, "far": 9},
    "causal, other lengths, bias": {"queries": [70, 33], "keys": [50, 90], "far": 8, "causal": True},
    "an odd head dim": {"queries": [63, 9], "dim": 24, "scale": 0.4, "far": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, varlen_case):
    case = varlen_case(**CASES[name])
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("name", ["odd lengths", "groups, near bias", "causal, other lengths, bias"])
def test_float64_rule_in_half_precision(name, varlen_case):
    case = varlen_case(**CASES[name], dtype=torch.float16)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


def test_rows_without_keys_give_zeros_and_zero_gradients(varlen_case):
    case = varlen_case([4, 9, 5], [0, 6, 5], causal=True, far=3)
    with use_backend("triton"), nan_filled_empties():
        out = case.op(*case.inputs)
        grads = torch.autograd.grad(out.sum(), case.inputs)
    assert out[:7].eq(0).all() and out[7:].ne(0).all() and grads[0][:7].eq(0).all()
    assert all(g.isfinite().all() for g in grads)


def test_a_table_can_hide_distances(varlen_case):
    case = varlen_case([30, 70], far=3)
    q, k, v, bias = case.inputs
    with torch.no_grad():
        bias[:, 0] = bias[:, -1] = -math.inf
        bias[1] = -math.inf
    with use_backend("triton"):
        assert_accurate(
            lambda *x: case.op(*x, bias.detach()), lambda *x: case.reference(*x, bias.detach()), q, k, v
        )
        out = case.op(q, k, v, bias)
    assert out[:, 1].eq(0).all()
    grads = torch.autograd.grad(out.sum(), case.inputs)
    assert all(g.isfinite().all() for g in grads) and grads[3][1].eq(0).all()


def test_a_gradient_in_splits_is_the_same_each_time(varlen_case, monkeypatch):
    from manyheads.core.ops.varlen_attention import triton

    case = varlen_case([100, 70, 30, 65], heads=1, far=4)
    monkeypatch.setattr(triton, "PROGRAMS", 6)  # two splits
    with use_backend("triton"), nan_filled_empties():
        grads = [torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs) for _ in range(2)]
        assert_accurate(case.op, case.reference, *case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_any_strides_and_nothing_at_all(varlen_case):
    case = varlen_case([63, 20], far=4)
    q, k, v, bias = case.inputs
    views = [x.requires_grad_() for x in torch.stack([x.detach() for x in (q, k, v)], 1).unbind(1)]
    wide = torch.stack([v.detach(), v.detach()], -1)[..., 0].requires_grad_()  # a last stride of 2 is copied
    with use_backend("triton"):
        assert_accurate(case.op, case.reference, views[0], views[1], wide, bias)
        for lengths in ([], [0, 0]):
            none = varlen_case(lengths, far=2)
            out = none.op(*none.inputs)
            assert out.shape == (0, 2, 16)
            assert torch.autograd.grad(out.sum(), none.inputs)[3].eq(0).all()


def test_many_sequences_find_their_programs():
    """Lengths around the block size: the bisection, and programs that have nothing to do."""
    lengths = torch.tensor([0, 64, 63, 65, 0, 0, 1, 128, 2])
    q, k, v = (torch.randn(int(lengths.sum()), 1, 8) for _ in range(3))
    cu = torch.cat([lengths[:1] * 0, lengths.cumsum(0)]).to(torch.int32)
    found = {}
    for backend in ("triton", "reference"):
        with use_backend(backend), nan_filled_empties():
            found[backend] = varlen_attention(q, k, v, cu)
    torch.testing.assert_close(found["triton"], found["reference"])


def test_opcheck(varlen_case):
    q, k, v, bias = varlen_case([5, 7], far=2).inputs
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    check_op(varlen_attention_op, [q, k, v, cu, cu, bias, True, 0.3, "triton"])
    plain = [x.detach() for x in (q, k, v)]
    out, rows = varlen_attention_op(*plain, cu, cu, bias.detach(), True, 0.3, "triton")
    inputs = [torch.randn_like(out), *plain, cu, cu, bias.detach(), out, rows, True, 0.3, "triton", True]
    check_op(varlen_attention_backward_op, inputs)
