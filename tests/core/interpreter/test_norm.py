"""The Triton kernels of the row norms in Triton's interpreter (test_interpreter.py starts the process)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.norm import crms_norm, custom_op, layer_norm, reference, rms_norm
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

NORMS = {
    "rms": (rms_norm, reference.rms_norm),
    "layer": (layer_norm, reference.layer_norm),
    "crms": (crms_norm, reference.crms_norm),
}
KINDS = list(NORMS)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 1.5 + 0.3).to(dtype).requires_grad_()


def with_residual(norm):
    return lambda x, weight, bias, residual: norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "d"), [(70, 8), (20, 63), (13, 100), (9, 197), (3, 768), (2, 8192)])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_rule(kind, rows, d, dtype):
    norm, plain = NORMS[kind]
    x, weight, bias, residual = (
        draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(rows, d), (d,), (d,), (rows, d)])
    )
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(with_residual(norm), with_residual(plain), x, weight, bias, residual)
        assert_accurate(norm, plain, x)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_walk_several_tiles(kind, monkeypatch):
    """Three programs over eight tiles: the loop, the ragged last tile and the two-stage sum."""
    from manyheads.core.ops.norm import triton

    monkeypatch.setitem(triton._BACKWARD[90], 64, triton.Config(4, 4, 3))
    norm, plain = NORMS[kind]
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(norm, plain, draw(30, 63), draw(63, seed=1), draw(63, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_mixed_dtypes_and_strides(kind):
    norm, plain = NORMS[kind]
    weight, bias = draw(24, seed=1), draw(24, seed=2)
    half = draw(5, 24, dtype=torch.float16)
    wide = draw(5, 48)[:, 24:].detach().requires_grad_()
    crossed = draw(24, 5).t().detach().requires_grad_()
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(norm, plain, wide, weight)
        assert_accurate(norm, plain, crossed, None, bias)
        assert_accurate(with_residual(norm), with_residual(plain), half, weight, bias, wide)
        assert_accurate(with_residual(norm), with_residual(plain), wide, weight, bias, crossed)
        y, z = norm(draw(0, 24), weight, bias, residual=draw(0, 24))
        assert y.shape == z.shape == (0, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_cpu_path(kind):
    x, weight, bias, residual = draw(6, 63), draw(63, seed=1), draw(63, seed=2), draw(6, 63, seed=3)
    norm = with_residual(NORMS[kind][0])
    with use_backend("triton"):
        ours = norm(x, weight, bias, residual)
    with torch.no_grad(), use_backend("cpu"):
        theirs = norm(x, weight, bias, residual)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_opcheck():
    x, weight = draw(3, 9), draw(9, seed=1)
    check_op(custom_op.norm, (x, draw(3, 9, seed=2), weight, weight, 1e-5, "layer"))


def test_the_longest_row():
    from manyheads.core.ops.norm import triton

    assert max(triton._FORWARD) == max(triton._BACKWARD[90]) == triton.MAX_ROW == 8192
    with use_backend("triton"), pytest.raises(UsageError, match="at most 8192"):
        rms_norm(draw(1, 8193))
