"""Linear attention, causal and not: the float64 rule, official outputs and gradients, streaming, packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.linear_attention import (
    LinearState,
    linear_attention,
    linear_attention_step,
    reference,
)
from manyheads.core.testing import assert_accurate, assert_within, check_gradients, nan_filled_empties

MAPS = ["elu", "relu", "squared_relu", "silu", "identity"]


def inputs(
    length: int, *, batch: int = 2, groups: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = [(batch, length, groups, 16), (batch, length, groups, 16), (batch, length, 4, 24)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def states(sequences: int) -> list[Tensor]:
    return [torch.randn(sequences, 4, 16, 24), torch.rand(sequences, 4, 16)]


def whole(function, **options):
    return lambda q, k, v: function(q, k, v, **options)


def causal(function, normalize: bool, **options):
    """Of q, k, v and the state's two tensors; returns the outputs and the last state's tensors."""

    def run(q, k, v, kv, z):
        out, last = function(
            q, k, v, causal=True, normalize=normalize, initial_state=LinearState(kv, z),
            return_state=True, **options,
        )  # fmt: skip
        return (out, last.kv, last.z) if normalize else (out, last.kv + 0 * z.sum())

    return run


def check_causal(given: list[Tensor], sequences: int, normalize: bool, **options) -> None:
    start = [x.requires_grad_() for x in states(sequences)]
    with nan_filled_empties():
        assert_accurate(
            causal(linear_attention, normalize, **options),
            causal(reference.linear_attention, normalize, **options),
            *given, *start,
        )  # fmt: skip


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [1, 63, 100, 197])
def test_float64_rule(length, normalize):
    """Without the causal order, one token is its own value, and the gradients of q and k are zero."""
    options = {"normalize": normalize, "feature_map": "elu"}
    with nan_filled_empties():
        assert_accurate(
            whole(linear_attention, **options), whole(reference.linear_attention, **options), *inputs(length)
        )
    check_causal(inputs(length), 2, normalize, feature_map="elu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision(normalize, dtype):
    options = {"normalize": normalize, "feature_map": "elu"}
    given = inputs(100, dtype=dtype)
    assert linear_attention(*given).dtype == dtype
    assert_accurate(whole(linear_attention, **options), whole(reference.linear_attention, **options), *given)
    check_causal(given, 2, normalize, feature_map="elu")


@pytest.mark.parametrize("feature_map", MAPS)
def test_feature_maps(feature_map):
    options = {"normalize": False, "feature_map": feature_map, "scale": 0.3}
    given = inputs(20)
    assert_accurate(whole(linear_attention, **options), whole(reference.linear_attention, **options), *given)
    check_causal(given, 2, False, feature_map=feature_map, scale=0.3)


@pytest.mark.parametrize("normalize", [False, True])
def test_packed(normalize):
    bounds = torch.tensor([0, 5, 5, 70, 135, 150], dtype=torch.int32)
    check_causal(inputs(150, batch=1), 5, normalize, feature_map="elu", cu_seqlens=bounds)


def test_other_queries_than_keys():
    q, (_, k, v) = torch.randn(2, 7, 4, 16, requires_grad=True), inputs(20)
    options = {"feature_map": "elu"}
    out = linear_attention(q, k, v, **options)
    assert out.shape == (2, 7, 4, 24)
    assert_accurate(whole(linear_attention, **options), whole(reference.linear_attention, **options), q, k, v)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["linear_attn_a1", "linear_attn_a2"])
def test_official(name, backend, golden):
    """flash-linear-attention's formula; q and k are recorded after the feature map."""
    case = golden("core", name)
    dtype, limits = (torch.float64, (2e-6, 2e-6)) if backend == "reference" else (torch.float32, (2e-5, 1e-4))
    leaves = {k: v.to(dtype).requires_grad_() for k, v in case.group("input").items()}
    start = LinearState(leaves["initial_state"]) if "initial_state" in leaves else None
    with use_backend(backend):
        out, last = linear_attention(
            leaves["q"], leaves["k"], leaves["v"], causal=True, normalize=case.config["normalize"],
            initial_state=start, return_state=True,
        )  # fmt: skip
    found = {"o": out, "final_state": last.kv, "final_z": None if last.z is None else last.z[:, None]}
    for key, want in case.group("output").items():
        assert_within(found[key], want, limits[0])
    sum((found[k] * v).sum() for k, v in case.group("cotangent").items()).backward()
    for key, want in case.group("grad_input").items():
        assert_within(leaves[key].grad, want, limits[1])


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_a_thousand_steps_in_one_pass_in_pieces_packed_and_one_by_one(normalize):
    options = {"normalize": normalize, "feature_map": "elu"}
    q, k, v = inputs(1000)
    start = LinearState(*states(2))
    whole_out, last = linear_attention(
        q, k, v, causal=True, initial_state=start, return_state=True, **options
    )
    state, pieces, single, steps = start, [], start, []
    sizes = [1, 2, 300, 64, 633]
    for part in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
        out, state = linear_attention(*part, causal=True, initial_state=state, return_state=True, **options)
        pieces.append(out)
    for t in range(1000):
        out, single = linear_attention_step(single, q[:, t], k[:, t], v[:, t], **options)
        steps.append(out)
    packed, packed_last = linear_attention(
        *(x.flatten(0, 1)[None] for x in (q, k, v)), causal=True, initial_state=start, return_state=True,
        cu_seqlens=torch.tensor([0, 1000, 2000], dtype=torch.int32), **options,
    )  # fmt: skip
    for found in (torch.cat(pieces, 1), torch.stack(steps, 1), packed[0].unflatten(0, (2, 1000))):
        assert (found - whole_out).abs().max() <= 1e-5 * whole_out.abs().max()
    for found in (state, single, packed_last):
        assert (found.kv - last.kv).abs().max() <= 1e-5 * last.kv.abs().max()
        assert not normalize or (found.z - last.z).abs().max() <= 1e-5 * last.z.abs().max()


def test_gradcheck_of_the_reference():
    given = [torch.rand(1, 4, 2, 3), torch.rand(1, 4, 2, 3), torch.randn(1, 4, 2, 3)]
    start = [torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3)]
    for pick in (0, 1, 2):
        check_gradients(
            lambda *a, pick=pick: causal(reference.linear_attention, True)(*a)[pick], *given, *start
        )
    check_gradients(whole(reference.linear_attention), *given)


@pytest.mark.parametrize("options", [{"causal": True}, {}], ids=str)
def test_compiles_without_a_graph_break(options):
    given = inputs(20)
    function = whole(linear_attention, feature_map="elu", **options)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(compiled(*given).square().sum(), given)
    want = torch.autograd.grad(function(*given).square().sum(), given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dispatch():
    def chosen(**options):
        return choose("linear_attention", **({"device": "cpu", "dtype": torch.float32} | options)).backend

    assert chosen() == chosen(device="cuda") == chosen(dtype=torch.float64) == "torch"
    assert chosen(length="short") == "reference"
    assert chosen(causal=True) == chosen(causal=True, length="short") == "cpu"
    assert chosen(causal=True, device="cuda") == "triton"
    assert chosen(causal=True, dtype=torch.float64) == "reference"


def test_refusals():
    q = torch.randn(2, 5, 4, 8)
    kv = torch.zeros(2, 4, 8, 8)
    wrong = [
        (ValueError, "feature_map must be one of", {"feature_map": "gelu"}),
        (ValueError, "belong to causal=True", {"return_state": True}),
        (ValueError, "belong to causal=True", {"initial_state": LinearState(kv)}),
        (ValueError, "must have z", {"causal": True, "initial_state": LinearState(kv)}),
        (ValueError, "z must be", {"causal": True, "initial_state": LinearState(kv, kv[..., :2, 0])}),
        (ValueError, "initial state must be", {"causal": True, "initial_state": LinearState(kv[:1])}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            linear_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="k and v in length"):
        linear_attention(q, q[:, :3], q)
    with pytest.raises(ValueError, match=r"q must be \[B, L, heads, dim\]"):
        linear_attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="agree in batch and length"):
        linear_attention(q[:, :3], q, q, causal=True)
    with pytest.raises(TypeError, match="one floating dtype"):
        linear_attention(q, q, q.double())
    with pytest.raises(ValueError, match=r"must be \[B, heads, dim\]"):
        linear_attention_step(LinearState(kv), q, q, q)
