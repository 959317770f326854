"""The selective scan's Triton kernels in Triton's interpreter (test_interpreter.py starts the process)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops.selective_scan import reference, selective_scan
from manyheads.core.ops.selective_scan.custom_op import selective_scan_backward_op, selective_scan_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

NAMES = ("D", "z", "delta_bias", "initial_state")


def check(inputs, **options):
    options = {"delta_softplus": True, "return_state": True} | options

    def calling(scan):
        return lambda *given: scan(*given[:5], **dict(zip(NAMES, given[5:], strict=True)), **options)

    with use_backend("triton"), nan_filled_empties():
        assert_accurate(calling(selective_scan), calling(reference.selective_scan), *inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 33, 16), (1, 35, 3, 3), (1, 67, 18, 16)], ids=str)
def test_float64_rule(shape, dtype, reverse, scan_inputs):
    check(scan_inputs(*shape, dtype), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(reverse, scan_inputs):
    ends = torch.tensor([0, 5, 5, 38, 41], dtype=torch.int32)
    check(scan_inputs(1, 41, 5, 4, states=4), reverse=reverse, cu_seqlens=ends)


@pytest.mark.parametrize(
    ("given", "softplus"), [((), False), ((5,), True), ((6,), False), ((5, 6), True), ((7, 8), True)]
)
def test_optional_arguments(given, softplus, scan_inputs):
    inputs = [x if i < 5 or i in given else None for i, x in enumerate(scan_inputs(1, 20, 5, 4))]
    inputs[2] = (0.1 * inputs[2].detach()).requires_grad_()
    check(inputs, delta_softplus=softplus, return_state=8 in given)


def test_slices_of_projections(scan_inputs):
    xz, x_dbl = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    _, _, A, _, _, D, _, bias, state = scan_inputs(2, 12, 8, 4)
    inputs = [xz[..., :8], x_dbl[..., :8], A, x_dbl[..., 8:12], x_dbl[..., 12:], D, xz[..., 8:], bias, state]
    check([x.detach().requires_grad_() for x in inputs])


def test_more_states_than_a_thread_holds(scan_inputs):
    check(scan_inputs(1, 5, 3, 65))


def test_opcheck(scan_inputs):
    u, delta, A, B, C, D, z, bias, state = scan_inputs(1, 7, 3, 2, states=2)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    args = (u, delta, A, B, C, D, z, bias, state, ends, True, False, "triton", True)
    check_op(selective_scan_op, args)
    plain = [x.detach() for x in args[:9]]
    y, last, kept = selective_scan_op(*plain, *args[9:])
    check_op(selective_scan_backward_op, (y, last, kept, *plain, *args[9:13]))
