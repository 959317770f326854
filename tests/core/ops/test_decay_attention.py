"""Linear attention with decay: the float64 rule, official outputs, streaming, packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.decay_attention import decay_attention, decay_attention_step, reference
from manyheads.core.ops.decay_attention.custom_op import decay_attention_backward_op, decay_attention_op
from manyheads.core.testing import (
    assert_accurate,
    assert_within,
    check_gradients,
    check_op,
    nan_filled_empties,
)

BACKENDS = ["cpu", "numba"]
KINDS = ["scalar", "vector"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    length: int,
    kind: str,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    dim: int = 16,
    width: int = 24,
    strength: float = 1.0,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k, v, log_decay and initial_state; log-decays are float32, as models compute them."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    shapes = {"scalar": (batch, length, heads), "vector": (batch, length, heads, dim), "constant": (heads,)}
    decay = (-strength * F.softplus(torch.randn(shapes[kind]))).requires_grad_()
    q, k = (draw(batch, length, groups, dim) for _ in range(2))
    state = torch.randn(sequences or batch, heads, dim, width, requires_grad=True)
    return [q, k, draw(batch, length, heads, width), decay, state]


def bind(function, **options):
    """Of q, k, v, log_decay and initial_state; returns the outputs and the last states."""
    return lambda q, k, v, g, s: function(q, k, v, g, initial_state=s, return_state=True, **options)


def check(backend: str, given: list[Tensor], **options):
    with use_backend(backend), nan_filled_empties():
        return assert_accurate(
            bind(decay_attention, **options), bind(reference.decay_attention, **options), *given
        )


@pytest.mark.parametrize(
    ("length", "reverse"), [(1, False), (63, False), (100, False), (197, False), (1, True), (100, True)]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule(backend, kind, length, reverse):
    rows = check(backend, inputs(length, kind), reverse=reverse)
    assert len(rows) == 7  # outputs, states and five gradients


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_constant_decay_is_one_of_each_step(backend):
    """Bit for bit; its gradient is the sum of theirs, which cancels: the float64 rule is for the terms."""
    *given, g, s = inputs(100, "constant")
    steps = g.detach().expand(2, 100, 4).clone().requires_grad_()
    with use_backend(backend):
        found, want = (bind(decay_attention)(*given, x, s) for x in (g, steps))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    (grad,) = torch.autograd.grad(found[0].square().sum(), g)
    (each,) = torch.autograd.grad(want[0].square().sum(), steps)
    torch.testing.assert_close(grad, each.sum((0, 1)), rtol=1e-6, atol=1e-6 * each.abs().sum().item())


@pytest.mark.parametrize("strength", [0.01, 20.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weak_and_strong_decays(backend, kind, strength):
    check(backend, inputs(130, kind, strength=strength))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strong_decay_among_weak_ones(backend, kind):
    """A running sum near -1000 must not blur the small differences after it; -inf forgets everything."""
    given = inputs(130, kind, strength=0.01)
    with torch.no_grad():
        given[3][:, 5:130:7] = -20.0
        given[3][:, 9] = -1000.0
        given[3][:, 70] = -torch.inf
    for reverse in (False, True):
        check(backend, given, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, kind, dtype):
    check(backend, inputs(100, kind, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_share_queries_or_keys(backend, kind):
    for queries, keys in ((1, 4), (4, 1), (2, 4), (1, 1), (4, 4)):
        given = inputs(20, kind)
        given[0], given[1] = (torch.randn(2, 20, n, 16, requires_grad=True) for n in (queries, keys))
        check(backend, given)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, kind, reverse):
    """Sequences of 0, 1, 5 and more steps than a chunk, one of them a whole number of chunks."""
    bounds = torch.tensor([0, 5, 5, 70, 134, 135, 150], dtype=torch.int32)
    given = inputs(150, kind, batch=1, sequences=6)
    check(backend, given, reverse=reverse, cu_seqlens=bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_that_are_not_asked_for(backend, kind):
    def without(function):
        return lambda q, k, v, g: function(q, k, v, g, scale=0.7)

    given = inputs(70, kind)[:4]
    with use_backend(backend), nan_filled_empties():
        assert_accurate(without(decay_attention), without(reference.decay_attention), *given)
        given[0].requires_grad_(False)
        given[3].requires_grad_(False)
        rows = assert_accurate(without(decay_attention), without(reference.decay_attention), *given)
        assert [row.name for row in rows] == ["output 0", "grad 1", "grad 2"]
        q, k, v, g, s = inputs(70, kind)
        _, last = decay_attention(q, k, v, g, initial_state=s, return_state=True)
        found = torch.autograd.grad(last.sum(), (q, k, v, g, s))
    assert found[0].eq(0).all() and all(x.isfinite().all() for x in found)
    want = torch.autograd.grad(
        reference.decay_attention(q, k, v, g, initial_state=s, return_state=True)[1].sum(), (k, v, g, s)
    )
    for a, b in zip(found[1:], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """One projection's slices, and a batch that is not the outermost axis."""
    both = torch.randn(30, 2, 4, 48)
    for kind in ("scalar", "vector"):
        given = inputs(30, kind, groups=4)
        given[0], given[1] = (both.transpose(0, 1)[..., i : i + 16].requires_grad_() for i in (0, 16))
        check(backend, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays(backend, kind):
    """What a NaN must reach is NaN; others of the chunk may be, and no other sequence."""
    for at in range(4):
        given = [x.detach() for x in inputs(40, kind, heads=2, groups=2)]
        given[at][0, 20] = torch.nan
        with use_backend(backend):
            out = decay_attention(*given[:4])
        assert out[0, 20].isnan().all() and out[1].isfinite().all()
        assert out[0, 21:].isnan().all() == (at > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_reference(kind):
    given = inputs(4, kind, heads=2, groups=1, dim=3, width=2)
    for pick in (0, 1):
        check_gradients(lambda *a, pick=pick: bind(reference.decay_attention)(*a)[pick], *given)
        check_gradients(lambda *a, pick=pick: bind(reference.decay_attention, reverse=True)(*a)[pick], *given)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", ["gla_a1", "simple_gla_a1", "simple_gla_a2", "retention_a1"])
def test_official(name, backend, golden):
    """flash-linear-attention's formulas; retention's has the heads before the steps."""
    case = golden("core", name)
    dtype, limits = (torch.float64, (2e-6, 2e-6)) if backend == "reference" else (torch.float32, (2e-5, 1e-4))
    leaves = {k: v.to(dtype).requires_grad_() for k, v in case.group("input").items()}
    head_first = name.startswith("retention")
    q, k, v = (leaves[x].transpose(1, 2) if head_first else leaves[x] for x in "qkv")
    gate = leaves.get("gk", leaves.get("g"))
    if gate is None:
        gate = torch.log1p(-(2.0 ** (-5 - torch.arange(q.shape[2], dtype=dtype))))
    scale = None if isinstance(case.config["scale"], str) else case.config["scale"]
    with use_backend(backend):
        out, last = decay_attention(
            q, k, v, gate, scale=scale, initial_state=leaves.get("initial_state"), return_state=True
        )
    found = {"o": out.transpose(1, 2) if head_first else out, "final_state": last}
    for key, want in case.group("output").items():
        assert_within(found[key], want, limits[0])
    sum((found[k] * v).sum() for k, v in case.group("cotangent").items()).backward()
    for key, want in case.group("grad_input").items():
        assert_within(leaves[key].grad, want, limits[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_in_one_pass_in_pieces_packed_and_one_by_one(backend, kind):
    q, k, v, g, start = inputs(1000, kind, strength=0.2)

    with use_backend(backend):
        whole, last = decay_attention(q, k, v, g, initial_state=start, return_state=True)
        pieces, state, begin = [], start, 0
        for size in (1, 2, 300, 64, 633):
            at = slice(begin, begin + size)
            out, state = decay_attention(
                *(x[:, at] for x in (q, k, v, g)), initial_state=state, return_state=True
            )
            pieces.append(out)
            begin += size
        bounds = torch.tensor([0, 1000, 2000], dtype=torch.int32)
        flat = [x.flatten(0, 1)[None] for x in (q, k, v, g)]
        packed, packed_last = decay_attention(
            *flat, initial_state=start, return_state=True, cu_seqlens=bounds
        )
    single, steps = start, []
    for t in range(1000):
        out, single = decay_attention_step(single, *(x[:, t] for x in (q, k, v, g)))
        steps.append(out)
    for found in (torch.cat(pieces, 1), packed[0].unflatten(0, (2, 1000)), torch.stack(steps, 1)):
        assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
    for found in (state, packed_last, single):
        assert (found - last).abs().max() <= 1e-5 * last.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["scalar", "vector", None])
def test_opcheck(kind, backend):
    q, k, v, g, state = inputs(20, kind or "scalar", heads=2, groups=2)
    g = None if kind is None else g
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    check_op(decay_attention_op, (q, k, v, g, state, None, 0.3, False, backend))
    flat = [None if x is None else x[:1].detach().requires_grad_() for x in (q, k, v, g)]
    check_op(decay_attention_op, (*flat, state, bounds, 0.3, True, backend))
    plain = [None if x is None else x.detach() for x in (q, k, v, g)]
    out, last, states = decay_attention_op(*plain, None, None, 0.3, False, backend)
    check_op(decay_attention_backward_op, (out, last, *plain, None, states, 0.3, False, backend))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind, dynamic):
    given = inputs(20, kind)
    compiled = torch.compile(bind(decay_attention), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for found, want in zip(compiled(*given), bind(decay_attention)(*given), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    found = torch.autograd.grad(compiled(*given)[0].square().sum(), given)
    want = torch.autograd.grad(bind(decay_attention)(*given)[0].square().sum(), given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_scan(backend):
    with use_backend(backend):
        q = torch.zeros(2, 0, 4, 16, requires_grad=True)
        state = torch.randn(2, 4, 16, 16, requires_grad=True)
        out, last = decay_attention(q, q, q, torch.zeros(4), initial_state=state, return_state=True)
        assert out.shape == (2, 0, 4, 16) and torch.equal(last, state)
        last.sum().backward()
        assert state.grad.eq(1).all()


def test_dispatch(monkeypatch):
    def chosen(**options):
        return choose("decay_attention", **({"device": "cpu", "dtype": torch.float32} | options)).backend

    assert chosen() == chosen(dtype=torch.bfloat16) == "numba"
    assert chosen(dtype=torch.float64) == "reference"
    monkeypatch.setattr("manyheads.core.dispatch.numba_installed", lambda: False)
    assert chosen() == "cpu"
    with use_backend("numba"), pytest.raises(UsageError, match="numba is not installed"):
        chosen()


def test_refusals():
    q = torch.randn(2, 5, 4, 8)
    g = torch.zeros(2, 5, 4)
    state = torch.zeros(2, 4, 8, 8)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    wrong = [
        (ValueError, r"q must be \[B, L, heads, dim\]", (q[0], q, q, g), {}),
        (TypeError, "one floating dtype", (q, q.double(), q, g), {}),
        (ValueError, "agree in batch and length", (q[:, :4], q, q, g), {}),
        (ValueError, "k's 3 heads must divide v's 4", (q, q[:, :, :3], q, g), {}),
        (ValueError, "agree in their last axis", (q[..., :4], q, q, g), {}),
        (ValueError, "log_decay must be", (q, q, q, g[..., :2]), {}),
        (TypeError, "log_decay must be floating", (q, q, q, g.int()), {}),
        (ValueError, "the initial state must be", (q, q, q, g), {"initial_state": state[:1]}),
        (TypeError, "initial state must be floating", (q, q, q, g), {"initial_state": state.int()}),
        (ValueError, "the batch must be 1", (q, q, q, g), {"cu_seqlens": bounds}),
        (ValueError, "must rise from 0 to 5", (*(x[:1] for x in (q, q, q, g)),), {"cu_seqlens": bounds - 1}),
    ]
    for error, message, given, options in wrong:
        with pytest.raises(error, match=message):
            decay_attention(*given, **options)
    with pytest.raises(ValueError, match=r"must be \[B, heads, dim\]"):
        decay_attention_step(state, q, q, q, g)
    with pytest.raises(ValueError, match="log_decay must be"):
        decay_attention_step(state, q[:, 0], q[:, 0], q[:, 0], g)
