"""The Triton kernels of attention in Triton's interpreter: forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops.attention import attention, reference
from manyheads.core.testing import assert_accurate, nan_filled_empties

pytestmark = pytest.mark.interpreter

CASES = {
    "one token": {"nq": 1, "nk": 1, "bias": (1, 1, 1, 1), "kind": "sigmoid"},
    "bias, broadcast over the batch": {"nq": 63, "nk": 63, "bias": (2, 63, 63)},
    "bias of every entry, several blocks": {
        "nq": 100,
        "nk": 197,
        "batch": 1,
        "heads": 1,
        "bias": (1, 1, 100, 197),
    },
    "bias of the keys, groups": {"nq": 63, "nk": 100, "heads": 4, "key_heads": 2, "bias": (2, 1, 1, 100)},
    "bias of the queries": {"nq": 100, "nk": 63, "bias": (2, 100, 1), "kind": "sigmoid"},
    "scalar bias": {"nq": 70, "nk": 70, "batch": 1, "heads": 1, "bias": (1,), "kind": "sigmoid"},
    "mask of the keys": {"nq": 100, "nk": 63, "mask": (2, 1, 1, 63), "bias": (100, 63)},
    "mask of every entry": {"nq": 63, "nk": 100, "mask": (2, 2, 63, 100)},
    "causal, more keys": {"nq": 63, "nk": 100, "causal": True, "bias": (2, 63, 100)},
    "causal, more queries": {"nq": 100, "nk": 63, "causal": True, "bias": (2, 100, 63)},
    "sigmoid": {
        "nq": 63,
        "nk": 100,
        "kind": "sigmoid",
        "bias": (2, 63, 100),
        "mask": (2, 1, 1, 100),
        "causal": True,
    },
    "scale after": {"nq": 100, "nk": 63, "post": (2, 100, 63)},
    "scale after, broadcast": {
        "nq": 100,
        "nk": 70,
        "post": (1, 1, 70),
        "bias": (2, 1, 1, 70),
        "key_heads": 1,
    },
    "scale after a sigmoid": {"nq": 63, "nk": 63, "post": (2, 2, 63, 63), "kind": "sigmoid"},
    "odd head dim": {"nq": 63, "nk": 63, "dim": 24, "bias": (2, 63, 63)},
}


@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, attention_case):
    assert interpreting()
    case = attention_case(**CASES[name])
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize(
    "name", ["bias, broadcast over the batch", "sigmoid", "scale after", "causal, more keys"]
)
def test_float64_rule_in_half_precision(name, attention_case):
    case = attention_case(**CASES[name], dtype=torch.float16)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


def test_rows_without_keys_give_zeros_and_zero_gradients(attention_case):
    case = attention_case(70, 63, bias=(2, 70, 63))
    mask = torch.rand(2, 1, 70, 63) > 0.4
    mask[0, :, 3] = False
    case.options["mask"] = mask
    with torch.no_grad():
        case.inputs[3][1, 5] = float("-inf")  # an additive mask that hides a whole row of head 1
    with use_backend("triton"):
        assert_accurate(case.op, case.reference, *case.inputs)
        out = case.op(*case.inputs)
    assert out[0, 3].eq(0).all() and out[:, 5, 1].eq(0).all()
    grads = torch.autograd.grad(out.sum(), case.inputs[:4])
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0, 3].eq(0).all() and grads[0][:, 5, 1].eq(0).all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_dropout_drops_the_same_weights_forward_and_backward(kind, attention_case):
    nq, nk, p = 70, 64, 0.3
    case = attention_case(nq, nk, dim=64, bias=(2, nq, nk), post=(2, nq, nk), kind=kind)
    q, k, _, bias, post = case.inputs

    def run(*inputs):
        torch.manual_seed(5)
        return case.op(*inputs)

    case.options["dropout_p"] = p
    with use_backend("triton"):
        # Values that are the identity give back the weights, and so what was dropped.
        eye = torch.eye(64).expand(2, 2, 64, 64).transpose(1, 2)
        kept = run(q, k, eye, bias, torch.ones_like(post)).detach().transpose(1, 2) != 0  # [B, H, Nq, Nk]
        share = kept.float().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0], kept[1])

        def known(q, k, v, bias, post):
            return reference.attention(q, k, v, bias=bias, post_scale=post * kept / (1 - p), kind=kind)

        assert_accurate(run, known, *case.inputs)
        torch.manual_seed(6)
        assert not torch.equal(case.op(*case.inputs), run(*case.inputs))


def test_any_strides_but_the_last(attention_case):
    case = attention_case(63, 100, bias=(2, 63, 100))
    q, k, v, bias, post = case.inputs
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k)]
    wide = torch.stack([v.detach(), v.detach()], -1)[..., 0].requires_grad_()  # a last stride of 2 is copied
    turned = bias.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    with use_backend("triton"):
        assert_accurate(case.op, case.reference, *strided, wide, turned, post)


def test_a_gradient_in_splits_is_the_same_each_time(attention_case):
    case = attention_case(63, 63, batch=6, heads=2, bias=(1, 63, 63))
    with use_backend("triton"):
        grads = [torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs[:4]) for _ in range(2)]
        assert_accurate(case.op, case.reference, *case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_gradients_wanted(attention_case):
    case = attention_case(63, 63, bias=(2, 63, 63), post=(2, 63, 63))
    q, k, v, bias, post = (x.detach() for x in case.inputs)
    with use_backend("triton"):
        got = attention(q, k, v, bias=bias, post_scale=post)
        dq = torch.autograd.grad(attention(q.requires_grad_(), k, v, bias=bias, post_scale=post).sum(), q)[0]
    want = torch.autograd.grad(reference.attention(q, k, v, bias=bias, post_scale=post).sum(), q)[0]
    assert not got.requires_grad
    assert torch.allclose(dq, want, atol=1e-5)
