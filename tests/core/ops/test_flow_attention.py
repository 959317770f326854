"""Flow attention against the official code's recorded tensors, float64, and what its formulas promise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.core.dispatch import choose, use_backend
from manyheads.core.ops.flow_attention import flow_attention, reference
from manyheads.core.testing import assert_accurate, check_gradients, nan_filled_empties

FORMS = [{"causal": causal, "clamp": clamp} for causal in (False, True) for clamp in (1.0, None)]


class Projected(nn.Module):
    """The op between the projections that the official module holds."""

    def __init__(self, config, causal):
        super().__init__()
        width = config["d_model"]
        for name in ("query", "key", "value"):
            self.add_module(f"{name}_projection", nn.Linear(config["d_input"], width))
        self.out_projection = nn.Linear(width, config["d_output"])
        self.heads, self.causal = config["n_heads"], causal

    def forward(self, queries, keys, values):
        given = zip(("query", "key", "value"), (queries, keys, values), strict=True)
        q, k, v = (
            self.get_submodule(f"{name}_projection")(x).unflatten(-1, (self.heads, -1)) for name, x in given
        )
        return self.out_projection(flow_attention(q, k, v, causal=self.causal).flatten(-2))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["causal", "normal_long_q", "normal_short_q"])
def test_the_papers_code(golden, name, backend):
    case = golden("timeseries", f"flow_attention_a_{name}")
    module = Projected(case.config, name == "causal")
    module.load_state_dict(case.group("param"), strict=True)
    inputs = case.inputs()
    with use_backend(backend, op="flow_attention"):
        case.check_all(inputs, {"y": module(**inputs)}, module)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_copies_without_a_bound(golden, backend):
    case = golden("timeseries", "flowattention_noclamp_a")
    inputs = case.inputs()
    given = (inputs["queries"], inputs["keys"], inputs["values"])
    with use_backend(backend, op="flow_attention"):
        case.check_all(inputs, {"y": flow_attention(*given, clamp=None)})


def draw(sinks, sources, dtype=torch.float32, batch=2):
    shapes = ((batch, sinks, 3, 5), (batch, sources, 3, 5), (batch, sources, 3, 7))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sinks", "sources"), [(1, 1), (7, 3), (63, 63), (100, 63), (63, 197), (197, 197)])
def test_float64_rule(sinks, sources, dtype, form):
    if form["causal"] and sinks != sources:
        sinks = sources
    # The largest errors are those of the first steps alone: of many sequences, so that they are typical.
    given = draw(sinks, sources, dtype, batch=16)
    with nan_filled_empties():
        assert_accurate(
            lambda *x: flow_attention(*x, **form), lambda *x: reference.flow_attention(*x, **form), *given
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_of_the_reference(form):
    given = [x[:1, :4, :1, :2] for x in draw(4, 4)]
    check_gradients(lambda *x: reference.flow_attention(*x, **form), *given)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float64_stays_float64(form):
    given = draw(20, 20, torch.float64)
    found, wanted = flow_attention(*given, **form), reference.flow_attention(*given, **form)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_causal_sees_no_later_step():
    q, k, v = draw(30, 30)
    later = [x.detach().clone() for x in (q, k, v)]
    for x in later:
        x[:, 20:] += 5
    now, then = (flow_attention(*x, causal=True)[:, :20] for x in ((q, k, v), later))
    torch.testing.assert_close(now, then)
    assert (flow_attention(q, k, v)[:, :20] - flow_attention(*later)[:, :20]).abs().max() > 0.01


def test_sources_of_equal_keys_give_their_mean():
    """The flows to a sink then are what it takes in, divided by it: the mean, times what it is allotted."""
    q, k, v = draw(6, 9)
    out = flow_attention(q, torch.zeros_like(k), v)
    shares = out / v.mean(1, keepdim=True)
    torch.testing.assert_close(shares, shares[..., :1].expand_as(shares), rtol=1e-4, atol=1e-5)
    assert 0 < shares.min() < shares.max() < 1


@pytest.mark.parametrize("tokens", [3, 500])
def test_unbounded_flows_that_are_large_stay_finite(tokens):
    """One open source among closed ones: the exponential of its flow leaves float32's range."""
    q, k, v = (x.detach() for x in draw(tokens, tokens))
    q, k = q * 0 + 20, k * 0 - 6
    k[:, -1] = 20
    out = flow_attention(q, k, v, clamp=None, causal=True)
    truth = reference.flow_attention(*(x.double() for x in (q, k, v)), clamp=None, causal=True)
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-4)


def test_nan_stays_nan():
    q, k, v = (x.detach() for x in draw(8, 8))
    v[0, 3, 1, 2] = torch.nan
    for causal in (False, True):
        out = flow_attention(q, k, v, causal=causal)
        assert out[0, 3:, 1, 2].isnan().all()
        assert out[1].isfinite().all()


def test_any_strides():
    q, k, v = (x.detach() for x in draw(40, 40))
    apart = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v)]
    for causal in (False, True):
        torch.testing.assert_close(
            flow_attention(*apart, causal=causal), flow_attention(q, k, v, causal=causal)
        )


def test_no_query():
    q, k, v = draw(0, 4)
    assert flow_attention(q, k, v).shape == (2, 0, 3, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dispatch(dtype):
    assert choose("flow_attention", device="cpu", dtype=dtype).backend == "torch"
    assert choose("flow_attention", device="cuda", dtype=dtype).backend == "torch"
    assert choose("flow_attention", device="cpu", dtype=dtype, length="short").backend == "reference"


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"q must be \[B, N, H, D\]"),
        (lambda q, k, v: (q, k.double(), v), TypeError, "k is torch.float64"),
        (lambda q, k, v: (q, k[..., :2], v), ValueError, "must agree"),
        (lambda q, k, v: (q, k, v[:, :3]), ValueError, "must agree in B, N and H"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, "no key"),
        (lambda q, k, v: (q[:, :5], k, v), ValueError, "of one length"),
    ],
)
def test_wrong_calls(spoil, error, complaint):
    with pytest.raises(error, match=complaint):
        flow_attention(*spoil(*draw(8, 8)), causal=True)


def test_wrong_bound():
    with pytest.raises(ValueError, match="clamp"):
        flow_attention(*draw(4, 4), clamp=0.0)
