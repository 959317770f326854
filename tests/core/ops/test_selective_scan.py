"""The selective scan against float64, the official reference, itself in pieces, and torch's tools."""

from __future__ import annotations

import itertools

import pytest
import torch

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.selective_scan import reference, selective_scan, selective_scan_step
from manyheads.core.ops.selective_scan.custom_op import selective_scan_backward_op, selective_scan_op
from manyheads.core.testing import (
    assert_accurate,
    assert_within,
    check_gradients,
    check_op,
    nan_filled_empties,
)

BACKENDS = ["numba", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = torch.tensor([0, 5, 5, 69, 70, 100], dtype=torch.int32)  # one of them is empty
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def calling(scan, **options):
    """The scan as a function of tensors alone, with both outputs."""
    options = {"delta_softplus": True, "return_state": True} | options
    return lambda *given: scan(*given[:5], **dict(zip(NAMES[5:], given[5:], strict=False)), **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 33, 16), (2, 63, 1, 3), (1, 100, 35, 16), (3, 197, 8, 5)], ids=str)
def test_float64_rule(shape, dtype, reverse, scan_inputs):
    for backend in BACKENDS:
        with use_backend(backend), nan_filled_empties():
            assert_accurate(
                calling(selective_scan, reverse=reverse),
                calling(reference.selective_scan, reverse=reverse),
                *scan_inputs(*shape, dtype),
            )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, reverse, scan_inputs):
    options = {"reverse": reverse, "cu_seqlens": PACKED}
    with use_backend(backend), nan_filled_empties():
        assert_accurate(
            calling(selective_scan, **options),
            calling(reference.selective_scan, **options),
            *scan_inputs(1, 100, 12, 4, states=5),
        )


@pytest.mark.parametrize("given", [(), (5,), (6,), (7,), (8,), (5, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_arguments(backend, given, scan_inputs):
    """Alone and together; without the softplus delta may be negative, and states grow."""
    inputs = [x if i < 5 or i in given else None for i, x in enumerate(scan_inputs(2, 37, 9, 4))]
    inputs[2] = (0.1 * inputs[2].detach()).requires_grad_()
    for softplus in (False, True):
        with use_backend(backend), nan_filled_empties():
            assert_accurate(
                calling(selective_scan, delta_softplus=softplus, return_state=False),
                calling(reference.selective_scan, delta_softplus=softplus, return_state=False),
                *inputs,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_projections(backend, scan_inputs):
    """As a block hands them over: u and z halves of one tensor, delta, B and C parts of another."""
    xz, x_dbl = torch.randn(2, 50, 48), torch.randn(2, 50, 24 + 8)
    crossed = torch.randn(2, 24, 50).transpose(1, 2)
    _, _, A, _, _, D, _, bias, state = scan_inputs(2, 50, 24, 4)
    for u in (xz[..., :24], crossed, xz[..., ::2]):
        inputs = [u, x_dbl[..., :24], A, x_dbl[..., 24:28], x_dbl[..., 28:], D, xz[..., 24:], bias, state]
        inputs = [x.detach().requires_grad_() for x in inputs]
        with use_backend(backend), nan_filled_empties():
            assert_accurate(calling(selective_scan), calling(reference.selective_scan), *inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_channels_and_states_in_several_parts(backend, scan_inputs):
    """Blocks of channels, parts over threads, groups of sequences, and their sums."""
    with use_backend(backend), nan_filled_empties():
        assert_accurate(
            calling(selective_scan), calling(reference.selective_scan), *scan_inputs(6, 40, 301, 17, seed=3)
        )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", ["selective_scan_a1", "selective_scan_a2", "selective_scan_a3"])
def test_official(name, backend, golden):
    case = golden("core", name)
    given = case.inputs()
    softplus = case.config["delta_softplus"]
    with use_backend(backend):
        if name.endswith("a3"):
            y, last = time_invariant(given, softplus)
        else:
            rows = {k: given[k].transpose(1, 2) for k in ("u", "delta", "z") if k in given}
            last_axis = given["B"].ndim - 1
            B, C = (given[k].movedim(last_axis, 1) for k in "BC")  # [B, L, (G,) N]
            y, last = selective_scan(
                rows["u"], rows["delta"], given["A"], B, C, D=given.get("D"), z=rows.get("z"),
                delta_bias=given.get("delta_bias"), delta_softplus=softplus, return_state=True,
            )  # fmt: skip
    found = {"out": y.transpose(1, 2), "last_state": last}
    for key, want in case.group("output").items():
        assert_within(found[key], want, 2e-5)
    loss = sum((found[k] * v).sum() for k, v in case.group("cotangent").items())
    wanted = case.group("grad_input")
    for key, grad in zip(wanted, torch.autograd.grad(loss, [given[k] for k in wanted]), strict=True):
        assert_within(grad, wanted[key], 1e-4)


def time_invariant(given, softplus):
    """B and C of each channel, the same at all times: each state a channel of its own, with N = 1."""
    d, n = given["A"].shape
    u, delta, z = (given[k].transpose(1, 2) for k in ("u", "delta", "z"))
    batch, length, _ = u.shape
    ones = torch.ones(batch, length, 1)
    y, last = selective_scan(
        (u[..., None] * given["B"]).flatten(2), delta.repeat_interleave(n, 2), given["A"].reshape(-1, 1),
        ones, ones, delta_bias=given["delta_bias"].repeat_interleave(n), delta_softplus=softplus,
        return_state=True,
    )  # fmt: skip
    y = (y.view(batch, length, d, n) * given["C"]).sum(-1)
    return y * torch.nn.functional.silu(z), last.view(batch, d, n)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_in_pieces(backend, reverse, scan_inputs):
    """One pass, chunks of odd sizes, packed, and (forward in time) one by one: the same to 1e-5."""
    with torch.no_grad(), use_backend(backend):
        u, delta, A, B, C, D, z, bias, state = scan_inputs(2, 1000, 6, 16)
        options = {"D": D, "delta_bias": bias, "delta_softplus": True, "reverse": reverse}
        whole, last = selective_scan(
            u, delta, A, B, C, z=z, initial_state=state, return_state=True, **options
        )
        pieces, h = {}, state
        edges = [0, 1, 34, 200, 201, 900, 1000]
        spans = list(itertools.pairwise(edges))
        for a, b in reversed(spans) if reverse else spans:
            pieces[a], h = selective_scan(
                u[:, a:b], delta[:, a:b], A, B[:, a:b], C[:, a:b], z=z[:, a:b], initial_state=h,
                return_state=True, **options,
            )  # fmt: skip
        near(torch.cat([pieces[a] for a in edges[:-1]], 1), whole)
        near(h, last)
        rows = [x.reshape(1, 2000, -1) for x in (u, delta, B, C, z)]
        packed, h = selective_scan(
            rows[0], rows[1], A, *rows[2:4], z=rows[4], initial_state=state, return_state=True,
            cu_seqlens=torch.tensor([0, 1000, 2000], dtype=torch.int32), **options,
        )  # fmt: skip
        near(packed.view(2, 1000, -1), whole)
        near(h, last)
        h = state
        del options["reverse"]
        for t in reversed(range(1000)) if reverse else range(1000):
            y, h = selective_scan_step(h, u[:, t], delta[:, t], A, B[:, t], C[:, t], z=z[:, t], **options)
            near(y, whole[:, t])
        near(h, last)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_reverse_is_a_scan_between_flips(scan_inputs):
    u, delta, A, B, C, D, z, bias, _ = scan_inputs(2, 70, 5, 4)
    options = {"D": D, "delta_bias": bias, "delta_softplus": True}
    turned = [x.flip(1) for x in (u, delta, B, C, z)]
    flipped = selective_scan(*turned[:2], A, *turned[2:4], z=turned[4], **options)
    near(selective_scan(u, delta, A, B, C, z=z, reverse=True, **options), flipped.flip(1))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_steps(backend, scan_inputs):
    u, delta, A, B, C, D, z, _, state = scan_inputs(2, 0, 5, 4)
    with use_backend(backend):
        y, last = selective_scan(u, delta, A, B, C, D=D, z=z, initial_state=state, return_state=True)
    (gradient,) = torch.autograd.grad(last.sum() + y.sum(), state)
    assert y.shape == (2, 0, 5) and torch.equal(last, state) and gradient.eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_and_spreads_forward_only(backend, scan_inputs):
    u, delta, A, B, C, *_ = (x.detach() for x in scan_inputs(1, 60, 4, 3))
    u[0, 40, 2] = torch.nan
    with use_backend(backend):
        y = selective_scan(u, delta, A, B, C, delta_softplus=True)
    assert y[0, 40:, 2].isnan().all()
    assert y[:, :40].isfinite().all() and y[..., :2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used_and_inputs_without_gradient(backend, scan_inputs):
    for output in (0, 1):
        for frozen in ((), (0, 2), (1, 3, 8)):
            inputs = [
                x.detach().requires_grad_(i not in frozen) for i, x in enumerate(scan_inputs(2, 40, 5, 4))
            ]

            def one(scan, given, output=output):
                # the zero holds on to inputs that the last state does not depend on
                return calling(scan)(*given)[output] + 0 * sum(x.sum() for x in given)

            with use_backend(backend), nan_filled_empties():
                assert_accurate(
                    lambda *g: one(selective_scan, g), lambda *g: one(reference.selective_scan, g), *inputs
                )


def test_inputs_are_not_written_to(scan_inputs):
    inputs = scan_inputs(1, 40, 1, 1)
    before = [x.clone() for x in inputs]
    for backend in BACKENDS:
        with use_backend(backend):
            y, last = calling(selective_scan)(*inputs)
            (y.sum() + last.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_each_time(backend, scan_inputs):
    inputs = scan_inputs(3, 100, 200, 8)
    with use_backend(backend):
        runs = [torch.autograd.grad(calling(selective_scan)(*inputs)[0].square().sum(), inputs) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck_of_the_reference_and_of_a_step(scan_inputs):
    inputs = scan_inputs(1, 4, 2, 3, torch.float64)
    check_gradients(
        lambda *g: torch.cat([x.flatten() for x in calling(reference.selective_scan)(*g)]), *inputs
    )

    def step(state, u, delta, A, B, C, D, z, bias):
        found = selective_scan_step(state, u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
        return torch.cat([x.flatten() for x in found])

    rows = [x[:, 0] if x.ndim == 3 else x for x in inputs[:8]]
    check_gradients(step, inputs[8], *rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, scan_inputs):
    u, delta, A, B, C, D, z, bias, state = scan_inputs(1, 40, 5, 3, states=2)
    ends = torch.tensor([0, 7, 40], dtype=torch.int32)
    for optional in ((D, z, bias, state, ends), (None, None, None, None, None)):
        check_op(selective_scan_op, (u, delta, A, B, C, *optional, True, False, backend, True))
        plain = [None if x is None else x.detach() for x in (u, delta, A, B, C, *optional)]
        y, last, kept = selective_scan_op(*plain, True, False, backend, True)
        check_op(selective_scan_backward_op, (y, last, kept, *plain, True, False, backend))


def test_compiles_without_a_graph_break(scan_inputs):
    inputs = scan_inputs(2, 40, 5, 3)
    scan = calling(selective_scan)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(*inputs), scan(*inputs), strict=True):
        assert torch.equal(found, wanted)
    found, wanted = (torch.autograd.grad(f(*inputs)[0].square().sum(), inputs) for f in (compiled, scan))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_dispatch(scan_inputs):
    assert choose("selective_scan", device="cpu", dtype=torch.bfloat16).backend == "numba"
    assert choose("selective_scan", device="cpu", dtype=torch.float64).backend == "reference"
    assert choose("selective_scan", device="cuda", dtype=torch.float32).backend == "triton"
    many = {"device": "cuda", "dtype": torch.float32, "states": "many"}
    assert choose("selective_scan", **many).backend == "reference"
    with use_backend("triton"), pytest.raises(UsageError, match="at most 256 states"):
        choose("selective_scan", **many)
    with use_backend("numba"), pytest.raises(UsageError, match="float32"):
        calling(selective_scan)(*scan_inputs(1, 4, 2, 3, torch.float64))


def test_without_numba(monkeypatch):
    monkeypatch.setattr("manyheads.core.dispatch.numba_installed", lambda: False)
    assert choose("selective_scan", device="cpu", dtype=torch.float32).backend == "cpu"


def test_refusals(scan_inputs):
    u, delta, A, B, C, _, z, _, state = scan_inputs(2, 6, 4, 3)
    with pytest.raises(ValueError, match=r"delta must be \[2, 6, 4\]"):
        selective_scan(u, delta[:, :5], A, B, C)
    with pytest.raises(ValueError, match=r"A \[D, N\]"):
        selective_scan(u, delta, A[0], B, C)
    with pytest.raises(ValueError, match="C must be"):
        selective_scan(u, delta, A, B, C[..., :2])
    with pytest.raises(ValueError, match="initial_state must be"):
        selective_scan(u, delta, A, B, C, initial_state=state[:1])
    with pytest.raises(ValueError, match="3 groups of B do not divide"):
        selective_scan(u, delta, A, *(x[:, :, None].expand(2, 6, 3, 3) for x in (B, C)))
    with pytest.raises(TypeError, match="z must be floating point"):
        selective_scan(u, delta, A, B, C, z=z.long())
    with pytest.raises(TypeError, match="must be int32"):
        selective_scan(u, delta, A, B, C, cu_seqlens=torch.tensor([0, 6]))
    ends = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="the batch must be 1"):
        selective_scan(u, delta, A, B, C, cu_seqlens=ends)
    for backend in [*BACKENDS, "reference"]:
        with use_backend(backend), pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
            selective_scan(u[:1], delta[:1], A, B[:1], C[:1], cu_seqlens=ends - 1)
    with pytest.raises(ValueError, match="selective_scan_step: state must be"):
        selective_scan_step(state[:1], u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0])
