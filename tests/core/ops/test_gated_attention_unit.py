"""The gated attention unit against float64, inside recorded MossFormer blocks, and row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.dispatch import choose, use_backend
from manyheads.core.errors import UsageError
from manyheads.core.ops.gated_attention_unit import cpu, custom_op, gated_attention_unit, reference
from manyheads.core.testing import assert_accurate, check_gradients, check_op, nan_filled_empties

BACKENDS = ["numba", "cpu"]
TOLERANCE = 1e-5  # relative and absolute, as the recorded cases' notes ask for


def inputs(batch: int, frames: int, keys: int = 8, dim: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, frames, keys)] * 4 + [(batch, frames, dim)] * 2
    scales = [2.0] * 4 + [1.0] * 2
    drawn = [torch.randn(*s, generator=generator) * f for s, f in zip(shapes, scales, strict=True)]
    return [x.requires_grad_() for x in drawn]


def pair(**options):
    return (
        lambda *given: gated_attention_unit(*given, **options),
        lambda *given: reference.gated_attention_unit(*given, **options),
    )


def block(parameters: dict[str, Tensor], x: Tensor, config: dict, mask: Tensor | None) -> Tensor:
    """A MossFormer block from its official parameters, around the op."""

    def unit(name: str, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        x = x / length.clamp(min=1e-5) * parameters[f"{name}.mdl.0.g"]
        x = F.linear(x, parameters[f"{name}.mdl.1.weight"], parameters[f"{name}.mdl.1.bias"])
        x = F.silu(x).transpose(1, 2)
        weight = parameters[f"{name}.mdl.3.sequential.1.conv.weight"]
        return (x + F.conv1d(x, weight, padding=8, groups=len(weight))).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        freqs = parameters["rotary_pos_emb.freqs"]
        angles = torch.arange(x.shape[1])[:, None] * freqs
        turned = torch.view_as_complex(x[..., : 2 * len(freqs)].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat((turned, x[..., 2 * len(freqs) :]), -1)

    shifted, kept = x.chunk(2, -1)
    given = torch.cat((F.pad(shifted, (0, 0, 1, -1)), kept), -1)
    v, u = unit("to_hidden", given).chunk(2, -1)
    qk = unit("to_qk", given)
    gamma, beta = parameters["qk_offset_scale.gamma"], parameters["qk_offset_scale.beta"]
    quad_q, lin_q, quad_k, lin_k = (rotate(qk * g + b) for g, b in zip(gamma, beta, strict=True))
    options = {"group_size": config["group_size"], "causal": config["causal"], "mask": mask}
    return x + unit("to_out", gated_attention_unit(quad_q, quad_k, lin_q, lin_k, v, u, **options))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", ["mossformer_block", "mossformer_block_mask", "mossformer_block_causal"])
def test_golden(golden, name, backend):
    case = golden("speech", f"{name}_a")
    parameters = {key: p.clone().requires_grad_() for key, p in case.group("param").items()}
    x, mask = case.tensors["input.x"].clone().requires_grad_(), case.tensors.get("input.mask")
    with use_backend(backend):
        y = block(parameters, x, case.config, None if mask is None else mask.bool())
        (y * case.tensors["cotangent.y"]).sum().backward()
    torch.testing.assert_close(y.detach(), case.tensors["output.y"], rtol=TOLERANCE, atol=TOLERANCE)
    found = {"x": x.grad} | {key: p.grad for key, p in parameters.items()}
    wanted = {"x": case.tensors["grad_input.x"]} | case.group("grad")
    assert len(wanted) > 10
    for key, want in wanted.items():
        # Largest where the official code's own float32 run is: sums over all frames.
        torch.testing.assert_close(found[key], want, rtol=TOLERANCE, atol=TOLERANCE * want.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("frames", "group"), [(1, 16), (63, 16), (100, 100), (197, 256), (64, 16)])
def test_float64_rule(frames, group, causal, backend):
    options = {"group_size": group, "causal": causal}
    # A single frame has a single weight: the plain formula's error is that of one sum, which may be none at
    # all by luck of the CPU's order of adding up. Many recordings of a frame each show what it usually is.
    many = 100 if frames == 1 else 1
    with use_backend(backend), nan_filled_empties():
        assert_accurate(*pair(**options), *inputs(2 * many, frames))
        given = inputs(3 * many, frames, 5, 7)
        mask = torch.rand(3 * many, frames) > 0.3
        lengths = torch.tensor([frames, frames // 2, 0]).repeat(many)
        assert_accurate(*pair(**options, mask=mask), *given)
        assert_accurate(*pair(**options, lengths=lengths), *given)
        assert_accurate(*pair(**options, lengths=lengths, mask=mask), *given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_rule_in_half_precision(dtype, backend):
    given = [x.detach().to(dtype).requires_grad_() for x in inputs(2, 63)]
    with use_backend(backend):
        assert_accurate(*pair(group_size=16), *given)
        assert gated_attention_unit(*given).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_the_recordings_one_by_one(causal, backend):
    """Whatever lies behind a row's end; the gradients there are zero."""
    given = [x.detach() for x in inputs(3, 50)]
    lengths = [50, 23, 1]
    padded = [x.clone() for x in given]
    for x in padded:
        for b, n in enumerate(lengths):
            x[b, n:] = math.nan
        x.requires_grad_()
    options = {"group_size": 16, "causal": causal}
    with use_backend(backend):
        y = gated_attention_unit(*padded, **options, lengths=torch.tensor(lengths))
        for b, n in enumerate(lengths):
            alone = gated_attention_unit(*(x[b : b + 1, :n] for x in given), **options)[0]
            torch.testing.assert_close(y[b, :n], alone)
            assert y[b, n:].eq(0).all()
    y.square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad[2, 1:].eq(0).all() for x in padded)
    plain = pair(**options, lengths=torch.tensor(lengths))[1](*padded)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_sees_no_later_frame(backend):
    given = [x.detach() for x in inputs(1, 50)]
    with use_backend(backend):
        before = gated_attention_unit(*given, group_size=16, causal=True)
        for x in given:
            x[:, 30:] += 1
        after = gated_attention_unit(*given, group_size=16, causal=True)
    torch.testing.assert_close(after[:, :30], before[:, :30], rtol=1e-5, atol=1e-6)
    assert (after[:, 30:] - before[:, 30:]).abs().min(dim=2).values.gt(0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_one_projection_are_not_copied(backend):
    """The two values as chunks, as separate tensors, and with other strides: one result."""
    *small, v, u = (x.detach() for x in inputs(2, 40))
    hidden = torch.cat((v, u), 2)
    halves = hidden.chunk(2, 2)
    assert cpu._joined(*halves).data_ptr() == hidden.data_ptr()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (v, u)]
    wide = torch.cat((hidden, hidden), 2)[..., :24].chunk(2, 2)
    with use_backend(backend):
        wanted = gated_attention_unit(*small, v, u, group_size=16)
        for values in (halves, turned, wide):
            torch.testing.assert_close(gated_attention_unit(*small, *values, group_size=16), wanted)
        hidden.requires_grad_()
        gated_attention_unit(*small, *hidden.chunk(2, 2), group_size=16).square().sum().backward()
        whole = hidden.detach().requires_grad_()
        y = gated_attention_unit(*small, whole, group_size=16)
        torch.testing.assert_close(y, wanted)
        y.square().sum().backward()
        compiled = torch.compile(gated_attention_unit, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*small, whole, group_size=16), wanted)
    assert torch.equal(whole.grad, hidden.grad)
    torch.testing.assert_close(reference.gated_attention_unit(*small, whole, group_size=16), wanted)
    v.requires_grad_(), u.requires_grad_()
    reference.gated_attention_unit(*small, v, u, group_size=16).square().sum().backward()
    torch.testing.assert_close(hidden.grad, torch.cat((v.grad, u.grad), 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_more_than_rounding(backend, monkeypatch):
    given = inputs(1, 100)
    with use_backend(backend):
        runs = []
        for count in (1, 3):
            monkeypatch.setattr(parallel, "workers", lambda count=count: count)
            y = gated_attention_unit(*given, group_size=16)
            runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for one, three in zip(*runs, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6 * one.abs().max().item())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan(backend):
    given = [x.detach() for x in inputs(2, 40)]
    for i in range(6):
        broken = [x.clone() for x in given]
        broken[i][1, 5] = math.nan
        with use_backend(backend):
            y = gated_attention_unit(*broken, group_size=16)
        assert y[1, 5].isnan().all() and y[0].isfinite().all()


def test_empty():
    given = [x[:0] for x in inputs(1, 5)]
    assert gated_attention_unit(*given).shape == (0, 5, 12)


def test_gradcheck_of_the_reference():
    mask, lengths = torch.rand(2, 7) > 0.3, torch.tensor([7, 4])
    for causal in (False, True):
        plain = pair(group_size=3, causal=causal, mask=mask, lengths=lengths)[1]
        check_gradients(plain, *inputs(2, 7, 2, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal):
    given = inputs(2, 9)
    mask, lengths = torch.rand(2, 9) > 0.3, torch.tensor([9, 4])
    for backend in BACKENDS:
        check_op(custom_op.gated_attention_unit_op, (*given, mask, lengths, 4, causal, backend))
    check_op(custom_op.gated_attention_unit_op, (*given, None, None, 4, causal, "cpu"))
    joined = torch.cat(given[4:], 2).detach().requires_grad_()
    check_op(custom_op.gated_attention_unit_op, (*given[:4], joined, None, mask, lengths, 4, causal, "cpu"))
    _, kept, sums = custom_op.gated_attention_unit_op(*given, mask, lengths, 4, causal, "cpu")
    plain = [x.detach() for x in (given[4], *given, kept, sums)]
    check_op(custom_op.gated_attention_unit_backward, (*plain, mask, lengths, 4, causal, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    given = inputs(2, 20)
    op = pair(group_size=8)[0]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*given), op(*given))
    found = torch.autograd.grad(compiled(*given).square().sum(), given)
    wanted = torch.autograd.grad(op(*given).square().sum(), given)
    torch.testing.assert_close(found, wanted)


def test_dispatch():
    def chosen(**call):
        return choose("gated_attention_unit", **({"device": "cpu", "dtype": torch.float32} | call)).backend

    assert [chosen(), chosen(dtype=torch.bfloat16)] == ["numba", "numba"]
    assert [chosen(dtype=torch.float64), chosen(device="cuda")] == ["reference", "reference"]
    with use_backend("cpu"), pytest.raises(UsageError, match="computes in float32"):
        chosen(dtype=torch.float64)


def test_refusals():
    given = inputs(2, 6)
    with pytest.raises(ValueError, match=r"lin_k must be \[2, 6, 8\]"):
        gated_attention_unit(*given[:3], given[3][..., :7], *given[4:])
    with pytest.raises(ValueError, match="both of one shape"):
        gated_attention_unit(*given[:5], given[5][..., :7])
    with pytest.raises(ValueError, match=r"v without u must be \[B, S, 2 E\], not \(2, 6, 7\)"):
        gated_attention_unit(*given[:4], given[4][..., :7])
    with pytest.raises(TypeError, match="quad_k must have v's dtype"):
        gated_attention_unit(given[0], given[1].half(), *given[2:])
    with pytest.raises(ValueError, match="group_size must be positive"):
        gated_attention_unit(*given, group_size=0)
    with pytest.raises(TypeError, match="mask must be boolean"):
        gated_attention_unit(*given, mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"mask must be \[2, 6\]"):
        gated_attention_unit(*given, mask=torch.ones(6, dtype=torch.bool))
    with pytest.raises(TypeError, match="lengths must be whole numbers"):
        gated_attention_unit(*given, lengths=torch.ones(2))
    with pytest.raises(ValueError, match=r"lengths must be \[2\]"):
        gated_attention_unit(*given, lengths=torch.ones(3).long())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_inside_alone(backend):
    """Products inside are of float32, also where the op is called under autocast."""
    given = inputs(2, 40)
    lengths = torch.tensor([40, 23])
    with use_backend(backend):
        plain = gated_attention_unit(*given, group_size=16, lengths=lengths)
        wanted = torch.autograd.grad(plain.square().sum(), given)
        with torch.autocast("cpu", torch.bfloat16):
            y = gated_attention_unit(*given, group_size=16, lengths=lengths)
            found = torch.autograd.grad(y.square().sum(), given)
            with torch.no_grad():
                quick = gated_attention_unit(*given, group_size=16, lengths=lengths)
    for have, want in zip((y, quick, *found), (plain, plain, *wanted), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
