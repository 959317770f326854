"""The Triton kernels of the delta rule in Triton's interpreter (test_interpreter.py starts the process)."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.delta_rule import delta_rule, reference
from manyheads.core.ops.delta_rule.custom_op import delta_rule_op
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]


def full(function, **options):
    return lambda q, k, v, beta, decay, state: function(
        q, k, v, beta, log_decay=decay, initial_state=state, return_state=True, **options
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "heads", "key", "value"), [(1, 1, 16, 16), (63, 2, 16, 20), (70, 1, 40, 33)]
)
def test_float64_rule(length, heads, key, value, dtype, gated, delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, length, heads, key, value, dtype=dtype)
    given = (q, k, v, beta, decay if gated else None, state)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(full(delta_rule), full(reference.delta_rule), *given)


def test_packed(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, 80, 1, 16, 8, states=4)
    bounds = torch.tensor([0, 33, 33, 34, 80], dtype=torch.int32)
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(
            full(delta_rule, cu_seqlens=bounds),
            full(reference.delta_rule, cu_seqlens=bounds),
            *(q, k, v, beta, decay, state),
        )


def test_strides_batches_and_one_output():
    qkv = torch.randn(2, 40, 3, 2, 16)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(2))
    rates = torch.rand(2, 2, 40).transpose(1, 2).requires_grad_()

    def run(function):
        return lambda *x: function(*x, normalize=True)

    with use_backend("triton"), nan_filled_empties():
        assert_accurate(run(delta_rule), run(reference.delta_rule), q, k, v, rates)


def test_strong_decays(delta_inputs):
    q, k, v, beta, decay, state = (x.detach() for x in delta_inputs(1, 64, 1, 16, 8))
    decay[:, ::7] *= 200
    decay[:, 40] = -torch.inf
    with use_backend("triton"), nan_filled_empties():
        assert_accurate(full(delta_rule), full(reference.delta_rule), q, k, v, beta, decay, state)


def test_opcheck(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, 40, 1, 16, 8, states=2)
    bounds = torch.tensor([0, 8, 40], dtype=torch.int32)
    check_op(delta_rule_op, (q, k, v, beta, decay, state, bounds, 0.5, True, "triton"))


def test_the_widest_head(delta_inputs):
    with use_backend("triton"), pytest.raises(UsageError, match="at most 64"):
        delta_rule(*delta_inputs(1, 2, 1, 65, 8)[:4])
