"""Attention on the CPU: every backend held to float64, and what must hold of any attention."""

from __future__ import annotations

import importlib

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops import attention as exported
from manyheads.core.ops.attention import attention, cpu_blocks, explain, reference
from manyheads.core.testing import assert_accurate, check_gradients, nan_filled_empties

SIZES = [(1, 1), (63, 63), (100, 100), (197, 197), (63, 197), (197, 100)]
FULL = {
    "learned bias": {"bias": (2, None, None)},
    "bias of every entry": {"bias": (2, 2, None, None)},
    "bias and mask": {"bias": (2, 1, None, None), "mask": (1, 2, None, None)},
    "causal bias": {"bias": (1, 2, None, None), "causal": True},
    "groups": {"bias": (4, None, None), "heads": 4, "key_heads": 2},
    "sigmoid": {"kind": "sigmoid", "bias": (2, None, None)},
    "scale after": {"post": (2, None, None)},
}
BROADCAST = {
    "scalar": ((1,), (1,)),
    "keys": ((100,), (2, 1, 1, 100)),
    "queries": ((2, 1, 63, 1), (6, 63, 1)),
    "heads": ((6, 1, 1), (1, 6, 1, 1)),
    "batches": ((2, 1, 1, 1), (1, 1, 63, 100)),
}


def sized(options, nq, nk):
    """Put the lengths where a shape leaves its last two dimensions open."""
    return {
        key: (*value[:-2], nq, nk) if isinstance(value, tuple) and value[-1] is None else value
        for key, value in options.items()
    }


# The gradient of a lone softmax weight's score is zero: test_one_token has that.
ALL = [(name, *size) for name in FULL for size in SIZES if size != (1, 1) or name == "sigmoid"]


@pytest.mark.parametrize(("name", "nq", "nk"), ALL)
def test_float64_rule(name, nq, nk, attention_case):
    case = attention_case(nq, nk, **sized(FULL[name], nq, nk))
    with nan_filled_empties(), use_backend("cpu"):
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_one_token(backend, attention_case):
    """A single softmax weight is 1 whatever the scores: the output is the value, score gradients vanish."""
    case = attention_case(1, 1, bias=(2, 1, 1))
    q, k, v, bias, _ = case.inputs
    with use_backend(backend):
        out = case.op(*case.inputs)
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert torch.equal(out, v) and torch.equal(grads[2], torch.ones_like(v))
    assert all(g.abs().max() < 1e-5 for g in (grads[0], grads[1], grads[3]))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", BROADCAST)
def test_gradients_of_what_is_broadcast(name, kind, attention_case):
    shape, other = BROADCAST[name]
    # A bias that is the same for every key does not change a softmax: its gradient is zero but for rounding.
    constant = kind == "softmax" and (not shape or shape[-1] == 1)
    case = attention_case(63, 100, heads=6, bias=None if constant else shape, post=other, kind=kind)
    with nan_filled_empties(), use_backend("cpu"):
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.fixture
def many_parts(monkeypatch):
    """Small blocks, and two threads however small the problem."""
    monkeypatch.setattr(cpu_blocks, "SMALL", 0)
    monkeypatch.setattr(cpu_blocks, "BLOCK", 3000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


PARTED = {**{name: sized(options, 63, 100) for name, options in FULL.items()}}
PARTED |= {
    f"broadcast {name}": {"bias": a, "kind": "sigmoid"}
    for name, (a, _) in BROADCAST.items()
    if name != "heads"
}
PARTED |= {
    "one head": {"heads": 1, "batch": 3, "bias": (63, 100)},
    "one of each": {"heads": 1, "batch": 1, "bias": (1, 63, 100)},
}


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("keep", [0, 10**9], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", PARTED)
def test_in_parts_and_blocks(name, keep, attention_case, monkeypatch):
    # By name: manyheads.core.ops.attention, as an attribute, is the function.
    monkeypatch.setattr(importlib.import_module("manyheads.core.ops.attention"), "KEEP", keep)
    case = attention_case(63, 100, **PARTED[name])
    with nan_filled_empties(), use_backend("cpu"):
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["learned bias", "sigmoid", "scale after", "bias and mask"])
def test_other_dtypes(name, dtype, attention_case):
    case = attention_case(63, 100, **sized(FULL[name], 63, 100), dtype=dtype)
    with nan_filled_empties(), use_backend("cpu"):
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("name", FULL)
def test_float64_is_exact(name, attention_case):
    case = attention_case(63, 100, **sized(FULL[name], 63, 100), dtype=torch.float64)
    wanted = [x for x in case.inputs if x is not None]
    results = []
    for function in (case.op, case.reference):
        with use_backend("cpu"):
            out = function(*case.inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "key_heads": 1},
        {"mask": (2, 1, 1, 100), "key_heads": 1},
        {"mask": (2, 2, 63, 100), "causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend(options, dtype, attention_case):
    case = attention_case(63, 100, dtype=dtype, **options)
    assert "torch:" in explain(*case.inputs[:3], **case.options)
    assert_accurate(case.op, case.reference, *case.inputs)


def test_the_default_takes_a_bias_without_gradient_to_torch(attention_case):
    case = attention_case(63, 100, bias=(2, 63, 100), mask=(2, 1, 1, 100), causal=True)
    case.inputs[3].requires_grad_(False)
    assert "torch:" in explain(*case.inputs[:3], bias=case.inputs[3], **case.options)
    assert_accurate(case.op, case.reference, *case.inputs)


def test_no_grad_keeps_the_fast_path(attention_case):
    case = attention_case(63, 63, bias=(2, 63, 63))
    q, k, v, bias, _ = case.inputs
    assert "cpu:" in explain(q, k, v, bias=bias)
    with torch.no_grad():
        assert "torch:" in explain(q, k, v, bias=bias)
        quick = attention(q, k, v, bias=bias)
    assert torch.allclose(quick, attention(q, k, v, bias=bias), atol=1e-6)


HERE = {
    "plain": {},
    "bias": {"bias": (2, 63, 63)},
    "sigmoid": {"kind": "sigmoid"},
    "post": {"post": (2, 63, 63)},
}
ROWS = [(b, o) for b in ("cpu", "torch", "reference") for o in HERE if b != "torch" or o in ("plain", "bias")]


@pytest.mark.parametrize(("backend", "options"), ROWS)
def test_rows_without_keys(backend, options, attention_case):
    case = attention_case(63, 63, mask=(2, 1, 63, 63), **HERE[options])
    case.options["mask"][0, :, 5] = False
    with use_backend(backend), nan_filled_empties():
        out = case.op(*case.inputs)
        wanted = [x for x in case.inputs if x is not None]
        grads = torch.autograd.grad(out.sum(), wanted)
    assert out[0, 5].eq(0).all() and out[1, 5].ne(0).any()
    assert grads[0][0, 5].eq(0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_additive_masks(backend, attention_case):
    case = attention_case(63, 100, bias=(2, 1, 63, 100))
    with torch.no_grad():
        case.inputs[3][0, :, 5] = float("-inf")  # a whole row
        case.inputs[3][:, :, 7:, 30:] = float("-inf")
    with use_backend(backend):
        out = case.op(*case.inputs)
        grads = torch.autograd.grad(out.square().sum(), case.inputs[:4])
    hidden = torch.isinf(case.inputs[3])
    plain = case.inputs[3].detach().masked_fill(hidden, 0.0)
    q, k, v = case.inputs[:3]
    same = reference.attention(q, k, v, bias=plain, mask=~hidden)
    assert torch.allclose(out, same, atol=1e-5)
    assert out[0, 5].eq(0).all()
    assert all(g.isfinite().all() for g in grads)
    assert grads[3][hidden].eq(0).all()


def test_causal_is_aligned_to_the_last_token(attention_case):
    """Queries are the last tokens: computed alone they get the rows they have in the full matrix."""
    case = attention_case(100, 100, causal=True)
    q, k, v, _, _ = case.inputs
    whole = attention(q, k, v, causal=True)
    for backend in ("torch", "cpu", "reference"):
        with use_backend(backend):
            assert torch.allclose(attention(q[:, -37:], k, v, causal=True), whole[:, -37:], atol=1e-5)
            # With more queries than keys, the first queries see nothing.
            fewer = attention(q, k[:, :60], v[:, :60], causal=True)
        assert fewer[:, :40].eq(0).all() and fewer[:, 40].ne(0).any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout(backend, bias, attention_case):
    n, p = 64, 0.3
    case = attention_case(n, n, dim=n, bias=(2, n, n) if bias else None)
    q, k, _, b, _ = case.inputs
    eye = torch.eye(n).expand(2, 2, n, n).transpose(1, 2).requires_grad_()

    def draw(seed):
        torch.manual_seed(seed)
        return attention(q, k, eye, bias=b, dropout_p=p)

    with use_backend(backend):
        out = draw(1)
        assert torch.equal(out, draw(1)) and not torch.equal(out, draw(2))
        clean = attention(q, k, eye, bias=b)
        kept = out != 0
        share = kept.float().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert torch.allclose(out, clean * kept / (1 - p), atol=1e-6)
        grad = torch.autograd.grad(draw(1)[..., 3].sum(), eye)[0]
        # d out[.., i, .., 3] / d value[j, 3] is the weight that was applied: dropped ones have none.
        assert torch.allclose(grad[..., 3].transpose(1, 2), out.transpose(1, 2).sum(2), atol=1e-5)


def test_dropout_goes_where_it_can_run(attention_case):
    case = attention_case(16, 16, bias=(2, 16, 16), dropout_p=0.5)
    assert "torch:" in explain(*case.inputs[:3], bias=case.inputs[3], dropout_p=0.5)
    assert "reference:" in explain(*case.inputs[:3], kind="sigmoid", dropout_p=0.5)


def test_any_strides(attention_case):
    case = attention_case(63, 100, bias=(2, 63, 100))
    q, k, v, bias, post = case.inputs
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k)]
    wide = torch.stack([v.detach(), v.detach()], -1)[..., 0].requires_grad_()
    flipped = bias.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_accurate(case.op, case.reference, *turned, wide, flipped, post)


def test_the_gradient_of_a_bias_is_the_same_each_time(attention_case):
    case = attention_case(197, 197, batch=4, bias=(1, 197, 197))
    first, second = (
        torch.autograd.grad(case.op(*case.inputs).square().sum(), case.inputs[:4]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("nq", "nk", "batch"), [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 1)])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_nothing_to_attend_to(nq, nk, batch, backend, attention_case):
    case = attention_case(nq, nk, batch=batch, bias=(1, 2, nq, nk))
    with use_backend(backend):
        out = case.op(*case.inputs)
    assert out.shape == (batch, nq, 2, 16) and out.eq(0).all() if nk == 0 else out.shape == (batch, nq, 2, 16)
    grads = torch.autograd.grad(out.sum(), case.inputs[0])
    assert grads[0].shape == case.inputs[0].shape


@pytest.mark.parametrize("options", [{}, {"kind": "sigmoid"}, {"causal": True}], ids=str)
def test_gradients_of_the_reference(options):
    q, k, v = torch.randn(1, 5, 4, 3), torch.randn(1, 7, 2, 3), torch.randn(1, 7, 2, 3)
    bias, post = torch.randn(4, 5, 7), torch.randn(1, 1, 5, 7)
    mask = torch.rand(5, 7) > 0.3
    mask[2] = False
    check_gradients(
        lambda q, k, v, b, p: reference.attention(q, k, v, bias=b, post_scale=p, mask=mask, **options),
        q, k, v, bias, post,
    )  # fmt: skip


def test_exported():
    assert exported is attention
