"""The delta rule against float64, the official recurrences, itself in pieces, and torch's tools."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops import delta_rule, delta_rule_step
from manyheads.core.ops.delta_rule import cpu, reference
from manyheads.core.ops.delta_rule.custom_op import delta_rule_backward_op, delta_rule_op
from manyheads.core.testing import (
    assert_accurate,
    assert_within,
    check_gradients,
    check_op,
    nan_filled_empties,
)


def full(function, **options):
    """All inputs, both outputs."""
    return lambda q, k, v, beta, decay, state: function(
        q, k, v, beta, log_decay=decay, initial_state=state, return_state=True, **options
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("length", "heads", "key", "value"),
    [(1, 1, 1, 1), (63, 2, 16, 20), (100, 2, 8, 12), (197, 1, 32, 16), (70, 1, 64, 64), (63, 2, 1, 5)],
)
def test_float64_rule(length, heads, key, value, gated, delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(2, length, heads, key, value)
    with use_backend("cpu"), nan_filled_empties():
        assert_accurate(
            full(delta_rule), full(reference.delta_rule), q, k, v, beta, decay if gated else None, state
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_rule_in_half_precision(dtype, delta_inputs):
    given = delta_inputs(1, 100, 2, 16, 20, dtype=dtype)
    with nan_filled_empties():
        assert_accurate(full(delta_rule), full(reference.delta_rule), *given)
        assert_accurate(full(delta_rule, normalize=True), full(reference.delta_rule, normalize=True), *given)


def test_float64_rule_with_strong_decays(delta_inputs):
    """Log-decays of -20 and below beside weak ones, and a gate that is shut."""
    q, k, v, beta, decay, state = delta_inputs(1, 80, 2, 16, 8)
    with torch.no_grad():
        decay[:, ::7] *= 200
        decay[:, 40] = -torch.inf
    assert_accurate(full(delta_rule), full(reference.delta_rule), q, k, v, beta, decay.detach(), state)


def test_equal_keys():
    """One key, written again and again with the full rate: what is read is the last value."""
    k = F.normalize(torch.ones(1, 90, 1, 16), dim=-1)
    v = torch.randn(1, 90, 1, 4)
    out = delta_rule(k, k, v, torch.ones(1, 90, 1), scale=1.0)
    torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", [16, 3])
@pytest.mark.parametrize("bounds", [[0, 63, 63, 64, 197, 200], [0, 200], [0, 32, 64, 200]])
def test_packed(bounds, key, delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, 200, 2, key, 8, states=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with nan_filled_empties():
        assert_accurate(
            full(delta_rule, cu_seqlens=cu_seqlens),
            full(reference.delta_rule, cu_seqlens=cu_seqlens),
            *(q, k, v, beta, decay, state),
        )
        out, last = full(delta_rule, cu_seqlens=cu_seqlens)(q, k, v, beta, decay, state)
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        parts = (x[:, a:b] for x in (q, k, v, beta, decay))
        if a < b:
            alone, end = full(delta_rule)(*parts, state[s : s + 1])
            torch.testing.assert_close(out[:, a:b], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last[s : s + 1], end, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(last[s], state[s])


def test_chunks_and_steps_equal_one_pass(delta_inputs):
    """1,000 steps at once, in pieces, and one by one."""
    q, k, v, beta, decay, _ = (x.detach() for x in delta_inputs(2, 1000, 2, 16, 8))
    k = 3 * k
    options = {"normalize": True, "scale": 0.7}
    whole, end = delta_rule(q, k, v, beta, log_decay=decay, return_state=True, **options)
    state, outputs = torch.zeros(2, 2, 16, 8), []
    for a, b in [(0, 1), (1, 300), (300, 333), (333, 1000)]:
        out, state = delta_rule(
            *(x[:, a:b] for x in (q, k, v, beta)), log_decay=decay[:, a:b], initial_state=state,
            return_state=True, **options,
        )  # fmt: skip
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)
    state, outputs = torch.zeros(2, 2, 16, 8), []
    for t in range(1000):
        out, state = delta_rule_step(
            state, *(x[:, t] for x in (q, k, v, beta)), log_decay=decay[:, t], **options
        )
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name", ["delta_rule_a1", "delta_rule_a2", "gated_delta_rule_a1", "gated_delta_rule_a2"]
)
def test_official_recurrences(golden, name, backend, delta_inputs):
    case = golden("core", name)
    given = case.inputs()
    first = name.startswith("delta")  # the ungated cases have the heads before the steps

    def swap(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if first else x

    scale = case.config["scale"] if isinstance(case.config["scale"], float) else None
    with use_backend("reference") if backend == "reference" else nan_filled_empties():
        out, state = delta_rule(
            *(swap(given[key]) for key in ("q", "k", "v", "beta")),
            log_decay=given.get("g"),
            scale=scale,
            initial_state=given.get("initial_state"),
            return_state=True,
        )
    found = {"o": swap(out), "final_state": state}
    sum((found[key] * x).sum() for key, x in case.group("cotangent").items()).backward()
    grads = {key: x.grad for key, x in given.items() if x.requires_grad}
    for group, got, limit in (("output", found, 2e-5), ("grad_input", grads, 1e-4)):
        expected = case.group(group)
        assert set(got) == set(expected)
        for key, want in expected.items():
            assert_within(got[key], want, limit)


def test_only_one_output_used(delta_inputs):
    given = delta_inputs(1, 40, 1, 16, 8)
    for pick in (0, 1):

        def chosen(function, *x, pick=pick):
            return full(function)(*x)[pick] + 0 * sum(y.sum() for y in x)

        assert_accurate(
            lambda *x: chosen(delta_rule, *x), lambda *x: chosen(reference.delta_rule, *x), *given
        )


def test_strided_inputs():
    qkv = torch.randn(2, 40, 3, 2, 16)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(2))
    rates = torch.rand(2, 2, 40).transpose(1, 2).requires_grad_()
    run = {"normalize": True}
    assert_accurate(
        lambda *x: delta_rule(*x, **run), lambda *x: reference.delta_rule(*x, **run), q, k, v, rates
    )


def test_no_steps(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(2, 0, 2, 16, 8)
    out, last = full(delta_rule)(q, k, v, beta, decay, state)
    assert out.shape == (2, 0, 2, 8) and torch.equal(last, state)


def test_nan_stays_nan_and_does_not_go_back(delta_inputs):
    given = [x.detach() for x in delta_inputs(1, 70, 1, 16, 8)]
    for at in range(5):
        wrong = [x.clone() for x in given]
        wrong[at][0, 50] = float("nan")
        out, state = full(delta_rule)(*wrong)
        assert out[0, 50].isnan().all()
        assert at == 0 or (out[0, 51:].isnan().any(-1).all() and state.isnan().any())
        assert out[0, :32].isfinite().all()  # of the chunks before


def test_gradcheck_of_the_reference(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, 4, 1, 2, 3)
    check_gradients(full(reference.delta_rule), q, k, v, beta, decay, state)
    channels = torch.rand(1, 4, 1, 3)
    check_gradients(lambda *x: reference.delta_rule(*x, normalize=True), q, k, v, channels)


def test_opcheck(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(1, 40, 2, 4, 3, states=2)
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32)
    check_op(delta_rule_op, (q, k, v, beta, decay, state, cu_seqlens, 0.5, True, "cpu"))
    check_op(delta_rule_op, (q, k, v, beta, None, None, None, 0.5, True, "cpu"))
    plain = [x.detach() for x in (q, k, v, beta)]
    out, last, kept = delta_rule_op(*plain, None, None, None, 0.5, True, "cpu")
    check_op(delta_rule_backward_op, (out, last, *plain, None, None, kept, 0.5, "cpu"))


def test_compiles_without_a_graph_break(delta_inputs):
    given = delta_inputs(1, 40, 2, 4, 3)
    run = full(delta_rule, normalize=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*given), run(*given), strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(f(*given)[0].square().sum(), given) for f in (compiled, run)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept(delta_inputs):
    """The backward keeps the inputs and one state a chunk, whatever autograd would."""
    q, k, v, beta, decay, _ = delta_inputs(1, 256, 1, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        delta_rule(q, k, v, beta, log_decay=decay)
    assert sum(kept) <= 3 * q.numel() + 2 * beta.numel() + 256 // cpu.SIZE * 16 * 16


def test_dispatch():
    def chosen(**other):
        return choose("delta_rule", **({"device": "cpu", "dtype": torch.float32} | other)).backend

    assert chosen() == chosen(dtype=torch.bfloat16) == "cpu"
    assert chosen(dtype=torch.float64) == chosen(channels=True) == "reference"
    assert chosen(device="cuda") == "triton"
    assert chosen(device="cuda", size="wide") == chosen(device="cuda", channels=True) == "reference"


def test_errors(delta_inputs):
    q, k, v, beta, decay, state = delta_inputs(2, 5, 2, 4, 3)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    for wrong, kind, match in [
        (lambda: delta_rule(q[0], k, v, beta), ValueError, "q must be"),
        (lambda: delta_rule(q, k[..., :2], v, beta), ValueError, "last axis"),
        (lambda: delta_rule(q[:, :, :1], k, v, beta), ValueError, "heads"),
        (lambda: delta_rule(q, k.half(), v, beta), TypeError, "k is torch.float16"),
        (lambda: delta_rule(q, k, v, beta[..., :1]), ValueError, "beta must be"),
        (lambda: delta_rule(q, k, v, beta.long()), TypeError, "beta must be floating"),
        (lambda: delta_rule(q, k, v, beta, log_decay=decay[:1]), ValueError, "log_decay must be"),
        (lambda: delta_rule(q, k, v, beta, initial_state=state[:1]), ValueError, "initial state"),
        (lambda: delta_rule(q, k, v, beta, cu_seqlens=bounds), ValueError, "batch must be 1"),
        (lambda: delta_rule_step(state, q, k, v, beta), ValueError, "must be"),
        (lambda: delta_rule_step(state[:1], q[:, 0], k[:, 0], v[:, 0], beta[:, 0]), ValueError, "state"),
    ]:
        with pytest.raises(kind, match=match):
            wrong()
