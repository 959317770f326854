"""The DeltaNet layer: its formula written out, streaming, packing, and the names of its parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.layers import DeltaNet

OPTIONS = [{}, {"gate": True}, {"decay": True, "expand": 2, "head_dim": 24, "gate": True, "d_conv": 3}]


def written_out(layer: DeltaNet, x: Tensor) -> Tensor:
    """One sequence, step by step, as the paper has it; float64."""

    def short(name: str) -> Tensor:
        y = getattr(layer, f"{name}_proj")(x)  # [L, D]
        weight = getattr(layer, f"{name}_conv1d").weight[:, 0]
        padded = F.pad(y, (0, 0, weight.shape[1] - 1, 0))
        y = F.silu(sum(padded[w : w + len(y)] * weight[:, w] for w in range(weight.shape[1])))
        return y.unflatten(-1, (layer.num_heads, -1))

    q, k, v = (short(name) for name in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = layer.b_proj(x).sigmoid()
    outputs = []
    state = x.new_zeros(layer.num_heads, q.shape[-1], v.shape[-1])
    for t in range(len(x)):
        if layer.a_proj is not None:
            state = (
                state
                * (-layer.A_log.exp() * F.softplus(layer.a_proj(x[t]) + layer.dt_bias)).exp()[:, None, None]
            )
        known = torch.einsum("hk,hkv->hv", k[t], state)
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * (v[t] - known))
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5)
    y = torch.stack(outputs)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.o_norm.weight
    y = y.flatten(-2)
    return layer.o_proj(y if layer.g_proj is None else y * F.silu(layer.g_proj(x)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options):
    layer = DeltaNet(32, 2, **options).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    want = torch.stack([written_out(layer, row) for row in x])
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    single = layer.float()(x.float())
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-5)
    single.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streaming_equals_one_pass(options):
    layer = DeltaNet(32, 2, **options)
    x = torch.randn(2, 100, 32)
    with torch.no_grad():
        whole, end = layer(x, return_state=True)
        state, outputs = layer.init_state(2), []
        for token in x.unbind(1):
            y, state = layer.step(token, state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-5, atol=1e-5)
        first, middle = layer(x[:, :37], return_state=True)
        second, last = layer(x[:, 37:], middle, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    for a, b, c in zip(end, state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_packed_equals_one_by_one():
    layer = DeltaNet(32, 2, decay=True)
    lengths = [5, 40, 1, 33]
    x = torch.randn(1, sum(lengths), 32)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out, state = layer(x, return_state=True, cu_seqlens=bounds)
    for i, part in enumerate(x.split(lengths, 1)):
        alone, end = layer(part, return_state=True)
        torch.testing.assert_close(out[:, bounds[i] : bounds[i + 1]], alone, rtol=1e-5, atol=1e-5)
        for a, b in zip(state, end, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-5, atol=1e-5)


def test_names_and_shapes():
    shapes = {
        key: tuple(p.shape) for key, p in DeltaNet(32, 4, gate=True, decay=True, expand=2).named_parameters()
    }
    assert shapes == {
        "A_log": (4,),
        "dt_bias": (4,),
        "q_proj.weight": (32, 32),
        "k_proj.weight": (32, 32),
        "v_proj.weight": (64, 32),
        "b_proj.weight": (4, 32),
        "q_conv1d.weight": (32, 1, 4),
        "k_conv1d.weight": (32, 1, 4),
        "v_conv1d.weight": (64, 1, 4),
        "g_proj.weight": (64, 32),
        "a_proj.weight": (4, 32),
        "o_norm.weight": (16,),
        "o_proj.weight": (32, 64),
    }


def test_first_steps_of_the_decay():
    step = F.softplus(DeltaNet(64, 64, decay=True).dt_bias)
    assert step.min() > 0.0009 and step.max() < 0.101


def test_errors():
    with pytest.raises(ValueError, match="num_heads 5"):
        DeltaNet(32, 5)
