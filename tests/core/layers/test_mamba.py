"""The Mamba blocks against the official ones, as streams, packed, and in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.core.dispatch import use_backend
from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.core.testing import assert_within

VIM = {  # where the classifier looks, in each recorded model
    "vim_a1": lambda x: x[:, (x.shape[1] - 1) // 2],
    "vim_a2": lambda x: x[:, (x.shape[1] - 1) // 2],
    "vim_a3": lambda x: x[:, (x.shape[1] - 1) // 2],
    "vim_a4": lambda x: x.mean(1),
    "vim_a5": lambda x: (x[:, 0] + x[:, -1]) / 2,
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_official_block(backend, golden, monkeypatch):
    monkeypatch.setenv("MANYHEADS_BACKEND", backend)
    case = golden("core", "mamba_block_a1")
    block = Mamba(16)
    block.load_state_dict(case.group("param"))
    x = case.inputs()["x"]
    y = block(x)
    assert_within(y, case.tensors["output.y"], 2e-5)
    (y * case.tensors["cotangent.y"]).sum().backward()
    assert_within(x.grad, case.tensors["grad_input.x"], 1e-4)
    for name, want in case.group("grad").items():
        assert_within(block.get_parameter(name).grad, want, 1e-4)
    state = block.init_state(3)
    with torch.no_grad():
        for t in range(x.shape[1]):
            token, state = block.step(x[:, t], state)
            assert_within(token, case.tensors["output.y"][:, t], 2e-5)
    assert_within(
        state.conv, case.tensors["aux.step_conv_state"][..., 1:], 2e-5
    )  # theirs holds the token itself too
    assert_within(state.ssm, case.tensors["aux.step_ssm_state"], 2e-5)


class Layer(nn.Module):
    """A layer of Vision Mamba: the norm of the stream, and the mixer."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-5)
        if config["if_bimamba"]:
            self.mixer = BidirectionalMamba(32, kind="v1", divide=config["if_divide_out"])
        elif config["bimamba_type"] == "v2":
            self.mixer = BidirectionalMamba(32, divide=config["if_divide_out"])
        else:
            self.mixer = Mamba(32)


class Tail(nn.Module):
    """What the recorded models do from their tokens on; parameters by their official names."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["depth"]))
        self.norm_f = nn.RMSNorm(32, eps=1e-5)
        self.head = nn.Linear(32, config["num_classes"])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", VIM)
def test_official_mixers(name, backend, golden):
    case = golden("vision", name)
    model = Tail(case.config)
    kept = {k: v for k, v in case.group("param").items() if k.split(".")[0] in ("layers", "norm_f", "head")}
    model.load_state_dict(kept)
    if backend == "cpu":
        with use_backend("cpu", op="selective_scan"):
            features, logits = run(model, case, VIM[name])
    else:
        features, logits = run(model, case, VIM[name])
    assert_within(features, case.tensors["output.features"], 2e-5)
    assert_within(logits, case.tensors["output.logits"], 2e-5)
    cotangents = case.group("cotangent")
    ((features * cotangents["features"]).sum() + (logits * cotangents["logits"]).sum()).backward()
    for key, parameter in model.named_parameters():
        assert_within(parameter.grad, case.tensors[f"grad.{key}"], 1e-4)


def run(model, case, pool):
    """Features and logits; each mixer's input and output are checked on the way."""
    hidden, stream = case.tensors["aux.tokens"], 0
    for number, layer in enumerate(model.layers):
        stream = stream + hidden
        hidden = layer.mixer(layer.norm(stream))
        assert_within(stream, case.tensors[f"aux.block{number}.residual"], 2e-5)
        assert_within(hidden, case.tensors[f"aux.block{number}.hidden"], 2e-5)
    features = pool(model.norm_f(stream + hidden))
    return features, model.head(features)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_streaming_equals_the_full_pass():
    block = Mamba(24, d_state=8, d_conv=3, dt_rank=5, bias=True)
    x = torch.randn(2, 1000, 24)
    with torch.no_grad():
        whole, last = block(x, return_state=True)
        state, found = None, []
        for piece in x.split([1, 2, 300, 65, 600, 32], 1):
            y, state = block(piece, state, return_state=True)
            found.append(y)
        near(torch.cat(found, 1), whole)
        near(state.conv, last.conv)
        near(state.ssm, last.ssm)
        state = block.init_state(2)
        for t in range(1000):
            y, state = block.step(x[:, t], state)
            near(y, whole[:, t])
        near(state.ssm, last.ssm)


@pytest.mark.parametrize("make", [Mamba, BidirectionalMamba])
def test_packed_sequences(make):
    block = make(16)
    lengths = [7, 1, 50, 33]
    ends = torch.tensor([0, 7, 8, 58, 91], dtype=torch.int32)
    x = torch.randn(1, 91, 16)
    packed = block(x, cu_seqlens=ends)
    near(packed, torch.cat([block(piece) for piece in x.split(lengths, 1)], 1))
    if make is Mamba:
        _, state = block(x, return_state=True, cu_seqlens=ends)
        _, alone = block(x[:, 8:58], return_state=True)
        near(state.conv[2:3], alone.conv)
        near(state.ssm[2:3], alone.ssm)


@pytest.mark.parametrize("options", [{}, {"divide": False}, {"kind": "v1"}, {"layer_scale": 0.1}], ids=str)
def test_both_directions_are_two_scans_with_flips(options):
    """The formula of the official slow path, which flips, in float64."""
    block = BidirectionalMamba(8, **options).double()
    x = torch.randn(2, 21, 8, dtype=torch.float64, requires_grad=True)
    xz = block.in_proj(x)
    suffix = "" if options.get("kind") == "v1" else "_b"
    ahead = direction(block, xz, "", block.A_log)
    back = direction(block, xz.flip(1), suffix, block.A_b_log, ahead[1] if not suffix else None)
    y = ahead[0] + back[0].flip(1)
    if options.get("divide", True) and suffix:
        y = y / 2
    y = block.out_proj(y) * options.get("layer_scale", 1)
    found = block(x)
    torch.testing.assert_close(found, y)
    given = [x, *(p for p in block.parameters() if p is not block.gamma)]
    grads = [torch.autograd.grad(out.square().sum(), given) for out in (found, y)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def direction(block, xz, suffix, A_log, convolved=None):
    """One gated scan, step by step; "v1" scans what the forward direction convolved, flipped."""
    layers = {name: getattr(block, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
    x, z = xz.chunk(2, -1)
    if convolved is None:
        conv = layers["conv1d"]
        padded = F.pad(x.transpose(1, 2), (conv.kernel_size[0] - 1, 0))
        x = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=x.shape[2])).transpose(1, 2)
    else:
        x = convolved.flip(1)
    n = A_log.shape[1]
    dt, B, C = layers["x_proj"](x).split([layers["dt_proj"].in_features, n, n], -1)
    dt = F.softplus(layers["dt_proj"](dt))
    h, steps = 0, []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -A_log.exp()) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        steps.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(steps, 1) + layers["D"] * x) * F.silu(z), x


def test_first_values():
    block = BidirectionalMamba(40, expand=3)
    assert block.dt_proj.in_features == 3 and block.D_b.shape == (120,)
    first = F.softplus(block.dt_proj.bias)
    assert (first > 0.00099).all() and (first < 0.101).all()
    assert torch.allclose(block.A_b_log.exp(), torch.arange(1.0, 17).expand(120, 16))


def test_parameters_of_vision_mamba_tiny():
    """24 layers' share of 7,148,008 parameters: without embeddings, norms and head."""
    count = sum(p.numel() for p in BidirectionalMamba(192).parameters())
    assert 24 * (count + 192) == 7_148_008 - (192 + 197 * 192 + 192 * 768 + 192 + 192 + 192 * 1000 + 1000)


def test_bfloat16():
    block = Mamba(16)
    x = torch.randn(2, 30, 16)
    wanted = block(x)
    found = block.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_no_such_kind():
    with pytest.raises(ValueError, match="kind must be 'v1' or 'v2'"):
        BidirectionalMamba(8, kind="v3")
