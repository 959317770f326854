"""The row norms against float64, against torch, and as ops that torch's tools know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.norm import cpu, crms_norm, custom_op, layer_norm, reference, rms_norm
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

NORMS = {
    "rms": (rms_norm, reference.rms_norm),
    "layer": (layer_norm, reference.layer_norm),
    "crms": (crms_norm, reference.crms_norm),
}
KINDS = list(NORMS)
OPS = [f"{kind}_norm" for kind in KINDS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 1.5 + offset).to(dtype).requires_grad_()


def inputs(rows: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(rows, d), (d,), (d,), (rows, d)])]


def asked(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == "auto" else use_backend(backend)


def with_residual(norm):
    return lambda x, weight, bias, residual: norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 63, 100, 197, 768])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_rule(kind, d, dtype):
    norm, plain = NORMS[kind]
    x, weight, bias, residual = inputs(63, d, dtype)
    for backend in ["auto"] if d == 1 else ["auto", "cpu"]:
        with asked(backend), nan_filled_empties():
            assert_accurate(with_residual(norm), with_residual(plain), x, weight, bias, residual)
            assert_accurate(norm, plain, x, weight, bias)
            assert_accurate(norm, plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_rule_where_sums_are_long_or_the_mean_is_large(kind):
    """Weight and bias gradients sum 3000 rows, several blocks of the CPU path. torch's LayerNorm fails."""
    norm, plain = NORMS[kind]
    assert_accurate(norm, plain, draw(1000, 32), draw(32, seed=1), draw(32, seed=2))
    assert_accurate(norm, plain, draw(3000, 197), draw(197, seed=1), draw(197, seed=2))
    assert_accurate(norm, plain, draw(300, 197, offset=30), draw(197, seed=1), draw(197, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_rule_in_short_rows(kind):
    norm, plain = NORMS[kind]
    for d in (2, 3, 7, 8, 16, 31, 32):
        assert_accurate(norm, plain, draw(197, d), draw(d, seed=1), draw(d, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_keep_the_wider_stream(kind):
    """A bfloat16 branch over a float32 stream, as autocast makes them, and float32 vectors over bfloat16."""
    norm, plain = NORMS[kind]
    x, weight, bias, residual = inputs(63, 100, torch.float32)
    y, z = norm(x.bfloat16(), weight, bias, residual=residual)
    assert y.dtype == z.dtype == torch.float32
    assert norm(x.bfloat16(), weight, bias).dtype == torch.bfloat16
    half = x.detach().bfloat16().requires_grad_()
    rows = assert_accurate(with_residual(norm), with_residual(plain), half, weight, bias, residual)
    assert len(rows) == 6  # y, z and the four gradients
    assert_accurate(norm, plain, half, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_only_one_output_used(kind):
    """Gradients through y alone, through z alone; z alone is the plain sum."""
    norm, plain = NORMS[kind]
    for pick in (0, 1):

        def chosen(f, x, weight, bias, residual, pick=pick):
            return f(x, weight, bias, residual=residual)[pick] + 0 * weight.sum() + 0 * bias.sum()

        assert_accurate(
            lambda *a: chosen(norm, *a), lambda *a: chosen(plain, *a), *inputs(7, 100, torch.float32)
        )
    x, weight, bias, residual = inputs(7, 100, torch.float32)
    norm(x, weight, bias, residual=residual)[1].sum().backward()
    assert weight.grad is None and torch.equal(x.grad, torch.ones(7, 100))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_gradient(kind, frozen):
    norm, plain = NORMS[kind]
    given = [
        t.requires_grad_(i not in frozen)
        for i, t in enumerate(map(Tensor.detach, inputs(9, 63, torch.float32)))
    ]
    rows = assert_accurate(with_residual(norm), with_residual(plain), *given)
    assert {f"grad {i}" for i in frozen}.isdisjoint(row.name for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_strides(kind):
    norm, plain = NORMS[kind]
    weight, bias = draw(24, seed=1), draw(24, seed=2)
    views = [
        draw(24),
        draw(2, 3, 5, 24),
        draw(5, 24, 3).transpose(1, 2),
        draw(5, 48)[:, ::2],
        draw(5, 48)[:, 24:],
    ]
    for x in (view.detach().requires_grad_() for view in views):
        assert_accurate(norm, plain, x, weight, bias)
        shifted = (x.detach() + 1).requires_grad_()
        assert_accurate(with_residual(norm), with_residual(plain), x, weight, bias, shifted)
    none = draw(0, 24)
    y, z = norm(none, weight, bias, residual=none)
    (y.sum() + z.sum()).backward()
    assert y.shape == z.shape == (0, 24) and weight.grad.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_gradient(kind):
    """sum() sends back a gradient of stride zero."""
    norm, plain = NORMS[kind]
    x, weight, bias, _ = inputs(11, 63, torch.float32)
    wanted = torch.autograd.grad(plain(x.double(), weight.double(), bias.double()).sum(), (x, weight, bias))
    found = torch.autograd.grad(norm(x, weight, bias).sum(), (x, weight, bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    plain = NORMS[kind][1]
    x, weight, bias, residual = inputs(3, 5, torch.float64)
    check_gradients(plain, x, weight, bias)
    check_gradients(lambda *a: with_residual(plain)(*a)[0], x, weight, bias, residual)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    x, weight, bias, residual = inputs(5, 7, torch.float32)
    check_op(custom_op.norm, (x, residual, weight, bias, 1e-5, kind))
    check_op(custom_op.norm, (x, None, weight, None, 1e-5, kind))
    _, z, stats = custom_op.norm(x, residual, weight, bias, 1e-5, kind)
    plain = [t.detach() for t in (x, residual, z, stats, weight)]
    check_op(custom_op.norm_backward, (*plain, kind, True))
    check_op(custom_op.norm_backward, (plain[0], None, *plain[2:4], None, kind, False))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind, dynamic):
    norm = NORMS[kind][0]
    x, weight, bias, residual = inputs(5, 7, torch.float32)
    compiled = torch.compile(with_residual(norm), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for found, wanted in zip(
        compiled(x, weight, bias, residual), norm(x, weight, bias, residual=residual), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found = torch.autograd.grad(
        compiled(x, weight, bias, residual)[0].square().sum(), (x, weight, bias, residual)
    )
    wanted = torch.autograd.grad(
        norm(x, weight, bias, residual=residual)[0].square().sum(), (x, weight, bias, residual)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_against_torch():
    x, weight, bias, residual = inputs(31, 100, torch.float64)
    y, z = layer_norm(x, weight, bias, residual=residual)
    torch.testing.assert_close(z, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, F.layer_norm(z, (100,), weight, bias))
    torch.testing.assert_close(reference.layer_norm(z, weight, bias), F.layer_norm(z, (100,), weight, bias))
    torch.testing.assert_close(reference.rms_norm(x, weight), F.rms_norm(x, (100,), weight, 1e-6))
    with use_backend("torch"):
        torch.testing.assert_close(rms_norm(x, weight, bias), F.rms_norm(x, (100,), weight, 1e-6) + bias)


def test_crms_is_rms_of_the_row_with_its_missing_entry():
    full = draw(13, 64).double()
    full = full - full.mean(-1, keepdim=True)
    torch.testing.assert_close(crms_norm(full[:, :-1]), rms_norm(full, eps=1e-5)[:, :-1])
    torch.testing.assert_close(crms_norm(full[:, :-1]), layer_norm(full)[:, :-1])


def test_dispatch():
    usual = {"device": "cpu", "dtype": torch.float32, "row": "usual", "rows": "many", "size": "large"}
    small = {"rows": "few", "size": "small"}

    def chosen(op, **features):
        return choose(op, **({"learns": True} | usual | features)).backend

    assert [chosen(op) for op in OPS] == ["cpu", "cpu", "cpu"]
    assert [chosen(op, **small) for op in OPS] == ["torch", "torch", "reference"]
    assert [chosen(op, row="short") for op in OPS] == ["reference"] * 3
    assert [chosen(op, dtype=torch.float64) for op in OPS] == ["torch", "torch", "reference"]
    assert [chosen(op, device="cuda") for op in OPS] == ["triton"] * 3
    assert [chosen(op, device="cuda", row="long") for op in OPS] == ["torch", "torch", "reference"]
    assert [chosen(op, **small, dtype=torch.bfloat16, mixed=True) for op in OPS] == [
        "cpu",
        "cpu",
        "reference",
    ]
    assert chosen("layer_norm", rows="few") == chosen("layer_norm", learns=False) == "torch"
    assert chosen("layer_norm", **small, dtype=torch.bfloat16) == "cpu"
    with use_backend("torch"), pytest.raises(UsageError, match="crms_norm has no backend 'torch'"):
        chosen("crms_norm")
    with use_backend("triton"), pytest.raises(UsageError, match="at most 8192"):
        chosen("rms_norm", device="cuda", row="long")


@pytest.mark.parametrize("kind", KINDS)
def test_large_input_takes_the_blockwise_path_and_a_small_one_does_not(kind, monkeypatch):
    calls = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: calls.append(a[0].shape) or backward(*a))
    norm = NORMS[kind][0]
    for rows in (16, 600):
        norm(draw(rows, 256), draw(256)).sum().backward()
    assert calls == [(600, 256)]


def test_refusals():
    x = draw(4, 6)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(x, draw(5))
    with pytest.raises(ValueError, match="residual must have"):
        layer_norm(x, residual=draw(1, 6))
    with pytest.raises(ValueError, match="with d > 0"):
        rms_norm(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        crms_norm(torch.ones(3, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 63, 100, 197, 768, 4096, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_rule_of_the_kernels(kind, d, dtype):
    norm, plain = NORMS[kind]
    x, weight, bias, residual = (t.detach().cuda().requires_grad_() for t in inputs(197, d, dtype))
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(with_residual(norm), with_residual(plain), x, weight, bias, residual)
        assert_accurate(norm, plain, x, weight)
        assert_accurate(norm, plain, x)
        check_op(custom_op.norm, (x, residual, weight, bias, 1e-5, kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_deterministic(kind):
    norm = NORMS[kind][0]
    x, weight, bias, _ = (t.detach().cuda().requires_grad_() for t in inputs(5000, 768, torch.bfloat16))
    runs = [torch.autograd.grad(norm(x, weight, bias).square().sum(), (x, weight, bias)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
