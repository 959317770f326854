"""The Triton kernels of attention on a GPU: float32, float16 and bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.attention import attention, explain, reference
from manyheads.core.ops.attention.custom_op import attention_backward_op, attention_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "bias, broadcast over the batch": {"nq": 197, "nk": 197, "bias": (2, 197, 197)},
    "bias of every entry": {"nq": 100, "nk": 197, "bias": (2, 2, 100, 197)},
    "bias of the keys, groups": {"nq": 63, "nk": 100, "heads": 4, "key_heads": 2, "bias": (2, 1, 1, 100)},
    "bias and mask": {"nq": 197, "nk": 100, "bias": (1, 2, 197, 100), "mask": (2, 1, 1, 100)},
    "causal, more keys": {"nq": 63, "nk": 100, "causal": True, "bias": (2, 63, 100)},
    "causal, more queries": {"nq": 100, "nk": 63, "causal": True, "bias": (2, 100, 63)},
    "sigmoid": {"nq": 197, "nk": 197, "kind": "sigmoid", "bias": (2, 197, 197), "mask": (2, 1, 1, 197)},
    "sigmoid, one token": {"nq": 1, "nk": 1, "kind": "sigmoid", "bias": (1, 1, 1, 1)},
    "scale after": {"nq": 100, "nk": 63, "post": (2, 100, 63)},
    "scale after and bias": {"nq": 100, "nk": 70, "post": (1, 1, 70), "bias": (2, 1, 1, 70)},
    "aligned": {"nq": 256, "nk": 256, "bias": (2, 256, 256)},
    "odd head dim": {"nq": 63, "nk": 63, "dim": 24, "bias": (2, 63, 63)},
    "windows": {"nq": 49, "nk": 49, "batch": 64, "heads": 3, "dim": 32, "bias": (3, 49, 49)},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_rule(name, dtype, attention_case):
    case = attention_case(**CASES[name], dtype=dtype, device="cuda")
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_every_row_of_the_table(dim, dtype, attention_case):
    if dim == 256 and dtype == torch.float32:
        pytest.skip("float32 stops at 128")
    for n in (49, 197):  # the short rows and the others
        for options in ({}, {"mask": (2, 1, 1, n), "post": (2, n, n)}):
            case = attention_case(n, n, dim=dim, bias=(2, n, n), dtype=dtype, device="cuda", **options)
            with use_backend("triton"), nan_filled_empties():
                assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(kind, dtype, attention_case):
    n, p = 128, 0.3
    case = attention_case(n, n, dim=n, bias=(2, n, n), kind=kind, dtype=dtype, device="cuda")
    q, k, _, bias, _ = case.inputs

    def run(q, k, v, bias, post):
        torch.manual_seed(5)
        return attention(q, k, v, bias=bias, post_scale=post, kind=kind, dropout_p=p)

    with use_backend("triton"):
        eye = torch.eye(n, device="cuda", dtype=dtype).expand(2, 2, n, n).transpose(1, 2)
        # Far from underflow, so that a zero means dropped: equal scores.
        kept = run(q * 0, k, eye, bias * 0, None).detach().transpose(1, 2) != 0
        share = kept.float().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5

        def known(q, k, v, bias, post):
            return reference.attention(q, k, v, bias=bias, post_scale=kept.to(q.dtype) / (1 - p), kind=kind)

        assert_accurate(run, known, *case.inputs)


def test_rows_without_keys(attention_case):
    case = attention_case(100, 63, bias=(2, 100, 63), mask=(2, 1, 100, 63), device="cuda")
    case.options["mask"][0, :, 3] = False
    for backend in ("triton", "torch", "reference"):
        with use_backend(backend):
            out = case.op(*case.inputs)
        grads = torch.autograd.grad(out.sum(), case.inputs[:4])
        assert out[0, 3].eq(0).all() and grads[0][0, 3].eq(0).all()
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": (2, 1, 1, 100)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_keeps_what_it_does_best(options, dtype, attention_case):
    case = attention_case(63, 100, dtype=dtype, device="cuda", **options)
    assert "torch:" in explain(*case.inputs[:3], **case.options)
    assert_accurate(case.op, case.reference, *case.inputs)


def test_the_default_for_a_learned_bias(attention_case):
    case = attention_case(63, 100, bias=(2, 63, 100), device="cuda")
    assert "triton:" in explain(*case.inputs[:3], bias=case.inputs[3])


def test_gradients_are_the_same_each_time(attention_case):
    case = attention_case(197, 197, batch=8, bias=(1, 197, 197), device="cuda", dtype=torch.bfloat16)
    first, second = (
        torch.autograd.grad(case.op(*case.inputs).float().square().sum(), case.inputs[:4]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_custom_ops(attention_case):
    case = attention_case(63, 100, bias=(2, 63, 100), device="cuda")
    q, k, v, bias, _ = case.inputs
    options = [False, 0.25, False, 0.0, "triton"]
    check_op(attention_op, [q, k, v, bias, None, None, None, *options, False])
    plain = [x.detach() for x in (q, k, v, bias)]
    out, lse, kept = attention_op(*plain, None, None, None, *options, False)
    check_op(
        attention_backward_op,
        [torch.randn_like(out), *plain, None, None, None, out, lse, kept, *options, True, False],
    )


def test_more_than_32_bits_of_offsets():
    """A bias of more than 2^31 entries, most of which is one row of zeros repeated."""
    n = 46_400
    q, k, v = (torch.randn(1, n, 1, 16, device="cuda", dtype=torch.float16) for _ in range(3))
    bias = torch.zeros(n, n, device="cuda", dtype=torch.float16)
    bias[-1] = torch.linspace(-4, 4, n)
    with use_backend("triton"):
        out = attention(q, k, v, bias=bias)
    want = reference.attention(*(x.double() for x in (q[:, -1:], k, v)), bias=bias[-1:].double())
    assert (out[:, -1:] - want).abs().max() < 2e-3
