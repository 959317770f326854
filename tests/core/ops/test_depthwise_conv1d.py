"""The depthwise convolution against float64, against torch and the recorded one, and as a stream."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from manyheads.core.dispatch import choose, explain, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.depthwise_conv1d import custom_op, depthwise_conv1d, depthwise_conv1d_step
from manyheads.core.testing import (
    assert_accurate,
    assert_within,
    check_gradients,
    check_op,
    nan_filled_empties,
)

BACKENDS = ["numba", "cpu"]
WIDTHS = [1, 2, 3, 4, 7, 11, 17, 31, 39]
LENGTHS = [1, 63, 100, 197]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule(backend, length, dtype, conv_case):
    """Every width, the forms in turn: causal with states, centred, reversed, with and without SiLU."""
    for width, form in zip(
        WIDTHS, itertools.cycle(["state", "reverse", "centred", "state, silu"]), strict=False
    ):
        case = conv_case(form, length, 9, width, dtype=dtype)
        with use_backend(backend), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


@pytest.mark.parametrize(
    "form", ["causal", "reverse", "centred", "centred reverse", "state", "state reverse"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_rule_of_every_form(backend, form, conv_case):
    for width, silu in itertools.product((1, 2, 4, 7), ("", ", silu")):
        case = conv_case(form + silu, 100, 33, width)
        packed = conv_case(form + silu, 100, 33, width, cu_seqlens=[0, 1, 1, 4, 63, 100])
        with use_backend(backend), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)
            assert_accurate(packed.op, packed.reference, *packed.inputs)


def test_float64_rule_over_several_tasks_and_threads(conv_case):
    """Long sums, rows split between threads, cuts inside the reach of wide filters."""
    for form, length, dim, width in [
        ("state, silu", 500, 384, 4),
        ("state reverse, silu", 500, 384, 4),
        ("centred", 1500, 40, 39),
        ("state reverse", 130, 1030, 39),
        ("centred, silu", 3000, 1, 7),
    ]:
        case = conv_case(form, length, dim, width)
        with use_backend("numba"), nan_filled_empties():
            assert_accurate(case.op, case.reference, *case.inputs)


def test_the_parts_are_the_whole_with_any_number_of_threads(conv_case):
    case = conv_case("state, silu", 1000, 384, 4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with use_backend("numba"):
                y, state = case.op(*case.inputs)
                found.append([y, *torch.autograd.grad(y.square().sum() + state.sum(), case.inputs)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of an even kernel: torch makes a copy
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_against_torch(backend):
    x, weight, bias = torch.randn(2, 50, 6), torch.randn(6, 5), torch.randn(6)
    with use_backend(backend):
        for width in (4, 5):
            taps = weight[:, :width]
            causal = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), taps[:, None], bias, groups=6)
            same = F.conv1d(x.transpose(1, 2), taps[:, None], bias, padding="same", groups=6)
            torch.testing.assert_close(depthwise_conv1d(x, taps, bias), causal.transpose(1, 2))
            torch.testing.assert_close(depthwise_conv1d(x, taps, bias, causal=False), same.transpose(1, 2))
            for options in ({"causal": True}, {"causal": False}):
                turned = depthwise_conv1d(x.flip(1), taps, bias, **options).flip(1)
                torch.testing.assert_close(depthwise_conv1d(x, taps, bias, reverse=True, **options), turned)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["causal_conv1d_a1", "causal_conv1d_a2"])
def test_golden(name, backend, golden):
    case = golden("core", name)
    given = case.inputs()
    with use_backend(backend):
        y, state = depthwise_conv1d(
            given["x"].transpose(1, 2),
            given["weight"],
            given.get("bias"),
            activation=case.config["activation"],
            initial_state=given.get("initial_states"),
            return_state=True,
        )
    found = {"out": y.transpose(1, 2), "final_states": state}
    for key, want in case.group("output").items():
        assert_within(found[key], want, 2e-5)
    sum((found[key] * x).sum() for key, x in case.group("cotangent").items()).backward()
    for key, want in case.group("grad_input").items():
        assert_within(given[key].grad, want, 1e-4)


def test_golden_step(golden):
    """The recorded state holds W inputs, of which the oldest is never used."""
    case = golden("core", "causal_conv1d_update_a1")
    given = case.group("input")
    oldest, state, steps = given["conv_state"][..., :1], given["conv_state"][..., 1:], []
    for token in given["x"].unbind(-1):
        oldest = state[..., :1]
        y, state = depthwise_conv1d_step(token, state, given["weight"], given["bias"], activation="silu")
        steps.append(y)
    found = {"out": torch.stack(steps, -1), "conv_state": torch.cat([oldest, state], -1)}
    for key, want in case.group("output").items():
        assert_within(found[key], want, 2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_thousand_steps_in_chunks_one_by_one_or_packed(backend):
    x, weight, bias = torch.randn(2, 1000, 6), torch.randn(6, 4), torch.randn(6)
    options = {"activation": "silu", "return_state": True}
    with use_backend(backend):
        whole, last = depthwise_conv1d(x, weight, bias, **options)
        for size in (1, 2, 63, 400):
            parts, state = [], None
            for chunk in x.split(size, 1) if size > 1 else x[:, :100].split(1, 1):
                y, state = depthwise_conv1d(chunk, weight, bias, initial_state=state, **options)
                parts.append(y)
            got = torch.cat(parts, 1)
            torch.testing.assert_close(got, whole[:, : got.shape[1]], rtol=1e-5, atol=1e-5)
            if size > 1:
                assert torch.equal(state, last)
        steps, state = [], torch.zeros(2, 6, 3)
        for token in x.unbind(1):
            y, state = depthwise_conv1d_step(token, state, weight, bias, activation="silu")
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(state, last)
        bounds = torch.tensor([0, 1000, 2000], dtype=torch.int32)
        packed, states = depthwise_conv1d(x.reshape(1, 2000, 6), weight, bias, cu_seqlens=bounds, **options)
    torch.testing.assert_close(packed.reshape(2, 1000, 6), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(states, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, conv_case):
    """Halves of wider tensors, as Mamba's projection gives them, transposed ones, an expanded gradient."""
    case = conv_case("state, silu", 63, 24, 4)
    x = case.inputs[0].detach()
    wide = torch.cat([x, x + 1, x], -1)
    views = [wide[..., 24:48], x.transpose(1, 2).contiguous().transpose(1, 2), wide[:, ::2, ::3]]
    views += [x[:, 5:40], x[:1].expand(2, -1, -1)]
    for view in views:
        given = [view.requires_grad_(), *case.inputs[1:]]
        with use_backend(backend), nan_filled_empties():
            assert_accurate(case.op, case.reference, *given)
            x_grad = torch.autograd.grad(case.op(*given)[0].sum(), given[0])[0]
        want = torch.autograd.grad(case.reference(*given)[0].sum(), given[0])[0]
        torch.testing.assert_close(x_grad, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (1, 2, 3)])
def test_inputs_without_gradient(frozen, conv_case):
    case = conv_case("state, silu", 63, 9, 4)
    case.options["return_state"] = False
    for i in frozen:
        case.inputs[i].requires_grad_(False)
    with use_backend("numba"):
        rows = assert_accurate(case.op, case.reference, *case.inputs)
    assert {f"grad {i}" for i in frozen}.isdisjoint(row.name for row in rows)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_goes_where_it_is_seen(backend):
    x, weight = torch.randn(1, 20, 3), torch.randn(3, 4)
    x[0, 10, 1] = float("nan")
    with use_backend(backend):
        y = depthwise_conv1d(x, weight, activation="silu")
    seen = torch.zeros(1, 20, 3, dtype=torch.bool)
    seen[0, 10:14, 1] = True
    assert torch.equal(y.isnan(), seen)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_large_values_through_silu(backend):
    x = torch.tensor([-200.0, -90, -1, 0, 1, 90, 200, float("inf")]).reshape(1, 8, 1).requires_grad_()
    weight = torch.ones(1, 1)
    with use_backend(backend):
        y = depthwise_conv1d(x, weight, activation="silu")
        grad = torch.autograd.grad(y[:, :-1].sum(), x)[0]
    torch.testing.assert_close(y, F.silu(x))
    torch.testing.assert_close(grad[:, :-1], torch.autograd.grad(F.silu(x)[:, :-1].sum(), x)[0][:, :-1])


def test_gradcheck_of_the_reference(conv_case):
    for form in ("state, silu", "centred reverse", "state reverse, silu"):
        case = conv_case(form, 5, 2, 4)
        for k in range(2 if "state" in form else 1):
            check_gradients(lambda *a, c=case, k=k: as_tuple(c.reference(*a))[k], *case.inputs)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def test_opcheck(conv_case):
    case = conv_case("state, silu", 7, 5, 4)
    x, weight, bias, state = case.inputs
    past = state.detach().transpose(1, 2).contiguous().requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    check_op(custom_op.convolve, (x, weight, bias, past, None, 3, True, "numba"))
    check_op(custom_op.convolve, (x[:1], weight, None, past, cu_seqlens, 3, True, "numba"))
    check_op(custom_op.convolve, (x, weight, None, None, None, 1, False, "cpu"))
    plain = [t.detach() for t in (x, x, weight, bias, past)]
    check_op(custom_op.convolve_backward, (*plain, None, 3, True, True, "numba"))
    check_op(custom_op.convolve_backward, (*plain[:3], None, None, None, 1, False, True, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, conv_case):
    case = conv_case("state, silu", 300, 64, 4)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for function in (compiled, torch.no_grad()(compiled)):
        for a, b in zip(function(*case.inputs), case.op(*case.inputs), strict=True):
            assert torch.equal(a, b)
    found, wanted = (torch.autograd.grad(f(*case.inputs)[0].sum(), case.inputs) for f in (compiled, case.op))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_do(backend):
    weight = torch.randn(3, 4, requires_grad=True)
    with use_backend(backend):
        y, state = depthwise_conv1d(torch.randn(2, 0, 3), weight, return_state=True)
        none = depthwise_conv1d(torch.randn(0, 7, 3), weight)
    assert y.shape == (2, 0, 3) and none.shape == (0, 7, 3)
    assert state.shape == (2, 3, 3) and not state.any()
    y.sum().backward()
    assert not weight.grad.any()


def test_dispatch(monkeypatch):
    usual = {"device": "cpu", "dtype": torch.float32}
    assert choose("depthwise_conv1d", **usual).backend == "numba"
    assert choose("depthwise_conv1d", device="cpu", dtype=torch.float64).backend == "reference"
    monkeypatch.setattr("manyheads.core.dispatch.numba_installed", lambda: False)
    assert choose("depthwise_conv1d", **usual).backend == "cpu"
    assert "numba is not installed" in explain("depthwise_conv1d", **usual)


def test_refusals():
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    state = torch.randn(2, 3, 3)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    for message, error, arguments, options in [
        ("x must be floating point", TypeError, (x.long(), weight), {}),
        (r"x must be \[B, L, D\]", ValueError, (x[0], weight), {}),
        (r"weight must be \[3, W\]", ValueError, (x, weight.t()), {}),
        (r"bias must be \[3\]", ValueError, (x, weight, weight), {}),
        ("activation must be None or 'silu'", ValueError, (x, weight), {"activation": "gelu"}),
        ("only a causal", ValueError, (x, weight), {"causal": False, "return_state": True}),
        (r"state must be \[2, 3, 3\]", ValueError, (x, weight), {"initial_state": state[:1]}),
        ("cu_seqlens must be int32", TypeError, (x[:1], weight), {"cu_seqlens": bounds.long()}),
        ("the batch must be 1, not 2", ValueError, (x, weight), {"cu_seqlens": bounds}),
        ("rise from 0 to 5", ValueError, (x[:1], weight), {"cu_seqlens": bounds[:2]}),
        ("rise from 0 to 5", ValueError, (x[:1], weight), {"cu_seqlens": bounds.flip(0)}),
        (r"cu_seqlens must be \[S \+ 1\]", ValueError, (x[:1], weight), {"cu_seqlens": bounds[:0]}),
    ]:
        with pytest.raises(error, match=f"depthwise_conv1d: .*{message}"):
            depthwise_conv1d(*arguments, **options)
    with pytest.raises(ValueError, match="depthwise_conv1d_step: the state"):
        depthwise_conv1d_step(x[:, 0], state[..., 1:], weight)
    with use_backend("numba"), pytest.raises(UsageError, match="the loops compute in float32"):
        depthwise_conv1d(x.double(), weight)
