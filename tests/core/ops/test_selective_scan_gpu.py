"""The selective scan's Triton kernels on a GPU: float32, float16 and bfloat16 (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import use_backend
from manyheads.core.ops.selective_scan import reference, selective_scan
from manyheads.core.ops.selective_scan.custom_op import selective_scan_backward_op, selective_scan_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("D", "z", "delta_bias", "initial_state")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def calling(scan, **options):
    options = {"delta_softplus": True, "return_state": True} | options
    return lambda *given: scan(*given[:5], **dict(zip(NAMES, given[5:], strict=True)), **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 1, 33, 16), (1, 63, 1, 3), (3, 100, 384, 16), (2, 197, 35, 16), (2, 40, 20, 1)], ids=str
)
def test_float64_rule(shape, dtype, reverse, scan_inputs):
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(
            calling(selective_scan, reverse=reverse),
            calling(reference.selective_scan, reverse=reverse),
            *scan_inputs(*shape, dtype, device="cuda"),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 128, 256])
def test_every_row_of_the_table(n, dtype, scan_inputs):
    for d in (48, 37):
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(
                calling(selective_scan),
                calling(reference.selective_scan),
                *scan_inputs(2, 70, d, n, dtype, device="cuda"),
            )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype, reverse, scan_inputs):
    ends = torch.tensor([0, 5, 5, 69, 70, 200], dtype=torch.int32, device="cuda")
    options = {"reverse": reverse, "cu_seqlens": ends}
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(
            calling(selective_scan, **options),
            calling(reference.selective_scan, **options),
            *scan_inputs(1, 200, 48, 16, dtype, states=5, device="cuda"),
        )


@pytest.mark.parametrize("given", [(), (5,), (6,), (7,), (8,)])
def test_optional_arguments(given, scan_inputs):
    inputs = [
        x if i < 5 or i in given else None
        for i, x in enumerate(scan_inputs(2, 37, 48, 16, torch.bfloat16, device="cuda"))
    ]
    inputs[2] = (0.1 * inputs[2].detach()).requires_grad_()
    for softplus in (False, True):
        options = {"delta_softplus": softplus, "return_state": False}
        with use_backend("triton"), nan_filled_empties():
            assert_accurate(
                calling(selective_scan, **options), calling(reference.selective_scan, **options), *inputs
            )


def test_nan_and_the_ends_of_the_exponential(scan_inputs):
    u, delta, A, B, C, *_ = (x.detach() for x in scan_inputs(1, 60, 48, 16, torch.float32, device="cuda"))
    u[0, 40, 2] = torch.nan
    delta[0, 10, 5] = 3e4  # every decay is zero
    y = selective_scan(u, delta, A, B, C, delta_softplus=True)
    assert y[0, 40:, 2].isnan().all() and y[:, :40].isfinite().all()
    want = reference.selective_scan(u, delta, A, B, C, delta_softplus=True)
    torch.testing.assert_close(y[:, :40], want[:, :40], rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_each_time(scan_inputs):
    inputs = scan_inputs(8, 197, 384, 16, torch.bfloat16, device="cuda")
    runs = [
        torch.autograd.grad(calling(selective_scan)(*inputs)[0].float().square().sum(), inputs) for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_custom_ops(scan_inputs):
    u, delta, A, B, C, D, z, bias, state = scan_inputs(1, 40, 5, 3, torch.float32, states=2, device="cuda")
    ends = torch.tensor([0, 7, 40], dtype=torch.int32, device="cuda")
    args = (u, delta, A, B, C, D, z, bias, state, ends, True, False, "triton", True)
    check_op(selective_scan_op, args)
    plain = [x.detach() for x in args[:9]]
    y, last, kept = selective_scan_op(*plain, *args[9:])
    check_op(selective_scan_backward_op, (y, last, kept, *plain, *args[9:13]))
