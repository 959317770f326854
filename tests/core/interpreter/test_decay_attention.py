"""The Triton kernels of linear attention with decay in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import interpreting, use_backend
from manyheads.core.ops.decay_attention import decay_attention, reference
from manyheads.core.ops.decay_attention.custom_op import decay_attention_backward_op, decay_attention_op
from manyheads.core.ops.linear_attention import linear_attention
from manyheads.core.ops.linear_attention import reference as linear_reference
from manyheads.core.testing import assert_accurate, check_op, nan_filled_empties

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]


def inputs(
    length: int,
    vector: bool,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    dim: int = 16,
    width: int = 24,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    decay = -F.softplus(torch.randn(batch, length, heads, *([dim] if vector else [])))
    q, k = (draw(batch, length, groups, dim) for _ in range(2))
    state = draw(sequences or batch, heads, dim, width)
    return [q, k, draw(batch, length, heads, width), decay.to(dtype).requires_grad_(), state]


def check(given: list[Tensor], **options) -> None:
    def bind(function):
        return lambda q, k, v, g, s: function(q, k, v, g, initial_state=s, return_state=True, **options)

    with use_backend("triton"), nan_filled_empties():
        rows = assert_accurate(bind(decay_attention), bind(reference.decay_attention), *given)
    assert len(rows) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("vector", "length"), [(False, 1), (False, 100), (True, 1), (True, 35)])
def test_float64_rule(vector, length, dtype):
    check(inputs(length, vector, dtype=dtype))


@pytest.mark.parametrize(("vector", "length"), [(False, 70), (True, 20)])
def test_reverse(vector, length):
    check(inputs(length, vector), reverse=True)


@pytest.mark.parametrize("vector", [False, True])
def test_packed(vector):
    bounds = torch.tensor([0, 3, 3, 22], dtype=torch.int32)
    check(inputs(22, vector, sequences=3), cu_seqlens=bounds)
    check(inputs(22, vector, sequences=3), cu_seqlens=bounds, reverse=True)


@pytest.mark.parametrize("vector", [False, True])
def test_several_blocks_of_channels_groups_and_strides(vector):
    """Blocks of 32 float32 channels; a head of keys for two of values."""
    given = inputs(9, vector, batch=2, dim=40, width=36)
    given[2] = torch.randn(2, 9, 2, 72)[..., :36].requires_grad_()
    check(given)


@pytest.mark.parametrize("vector", [False, True])
def test_a_strong_decay_among_weak_ones(vector):
    given = inputs(24, vector)
    with torch.no_grad():
        given[3] *= 0.01
        given[3][:, 5::7] = -20.0
        given[3][:, 9] = -1000.0
        given[3][:, 21] = -torch.inf
    check(given)


@pytest.mark.parametrize("vector", [False, True])
def test_nan_stays(vector):
    for at in range(4):
        given = [x.detach() for x in inputs(5, vector, batch=2)]
        given[at][0, 3] = torch.nan
        with use_backend("triton"):
            out = decay_attention(*given[:4])
        assert out[0, 3].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_without_decay(normalize):
    q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))

    def bind(function):
        return lambda q, k, v: function(q, k, v, causal=True, feature_map="elu", normalize=normalize)

    with use_backend("triton"), nan_filled_empties():
        assert_accurate(bind(linear_attention), bind(linear_reference.linear_attention), q, k, v)


def test_opcheck():
    q, k, v, g, state = inputs(5, False)
    check_op(decay_attention_op, (q, k, v, g, state, None, 0.3, False, "triton"))
    plain = [x.detach() for x in (q, k, v, g)]
    out, last, states = decay_attention_op(*plain, None, None, 0.3, False, "triton")
    check_op(decay_attention_backward_op, (out, last, *plain, None, states, 0.3, False, "triton"))
