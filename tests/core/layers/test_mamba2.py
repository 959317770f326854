"""The Mamba-2 block and its scan: official weights, outputs and gradients; streaming and packed sequences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.layers.mamba2 import Mamba2, Mamba2State, ssd, ssd_step, step_sizes
from manyheads.core.testing import assert_within

NAMES = {"d_model": "dim", "headdim": "head_dim", "ngroups": "groups", "D_has_hdim": "D_per_channel"}
# float64 runs the reference, float32 the CPU paths; the tolerances are those of the cases' json.
PRECISIONS = [(torch.float64, 2e-6, 2e-6), (torch.float32, 2e-5, 1e-4)]


def build(config: dict) -> Mamba2:
    options = {NAMES.get(k, k): v for k, v in config.items() if k not in ("chunk_size", "rmsnorm")}
    return Mamba2(**options, norm="rms" if config.get("rmsnorm", True) else None)


@pytest.mark.parametrize(("dtype", "forward", "backward"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["mamba2_block_a1", "mamba2_block_a2", "mamba2_block_a3"])
def test_official_block(name, dtype, forward, backward, golden):
    case = golden("core", name)
    block = build(case.config).to(dtype)
    block.load_state_dict(case.group("param"), strict=True)
    x = case.tensors["input.x"].to(dtype).requires_grad_()
    y = block(x)
    assert_within(y, case.tensors["output.y"], forward)
    (y * case.tensors["cotangent.y"]).sum().backward()
    assert_within(x.grad, case.tensors["grad_input.x"], backward)
    wanted = case.group("grad")
    assert {k for k, _ in block.named_parameters()} == set(wanted)
    for key, parameter in block.named_parameters():
        assert_within(parameter.grad, wanted[key], backward)


def test_official_state(golden):
    """Their convolution's state has the newest input, too, W wide; their scan's is transposed."""
    case = golden("core", "mamba2_block_a1")
    block = build(case.config).double()
    block.load_state_dict(case.group("param"))
    _, state = block(case.tensors["input.x"].double(), return_state=True)
    assert_within(state.conv, case.tensors["aux.step_conv_state"][..., 1:], 2e-6)
    assert_within(state.ssm.mT, case.tensors["aux.step_ssm_state"], 2e-6)


def scan(inputs: dict[str, Tensor], config: dict, **options) -> tuple[Tensor, Tensor]:
    limit = tuple(config["dt_limit"] or (0.0, math.inf))
    dt = step_sizes(inputs["dt"], inputs["dt_bias"], limit)
    given = [inputs[k] for k in ("x", "A", "B", "C")]
    y, state = ssd(given[0], dt, *given[1:], D=inputs.get("D"), **options)
    return (y * F.silu(inputs["z"]) if "z" in inputs else y), state.mT


@pytest.mark.parametrize(("dtype", "forward", "backward"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["ssd_a1", "ssd_a2", "ssd_a3"])
def test_official_scan(name, dtype, forward, backward, golden):
    case = golden("core", name)
    inputs = {
        k: v.to(dtype).requires_grad_(v.is_floating_point()) if v.is_floating_point() else v
        for k, v in case.group("input").items()
    }
    found = packed(inputs, case.config) if "seq_idx" in inputs else scan(inputs, case.config)
    for got, key in zip(found, ("out", "final_states"), strict=True):
        assert_within(got, case.tensors[f"output.{key}"], forward)
    loss = (found[0] * case.tensors["cotangent.out"]).sum()
    loss += (found[1] * case.tensors["cotangent.final_states"]).sum()
    loss.backward()
    for key, want in case.group("grad_input").items():
        assert_within(inputs[key].grad, want, backward)


def packed(inputs: dict[str, Tensor], config: dict) -> tuple[Tensor, Tensor]:
    """Rows with several sequences each (seq_idx), as one row of packed ones; a row's first has its state."""
    index = inputs["seq_idx"]
    rows, length = index.shape
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[:, 1:] = index[:, 1:] != index[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=rows * length).int()
    first = starts % length == 0
    states = torch.zeros(len(starts), *inputs["initial_states"].shape[1:], dtype=inputs["x"].dtype)
    states = states.index_copy(0, first.nonzero()[:, 0], inputs["initial_states"])
    flat = dict(inputs) | {k: inputs[k].flatten(0, 1)[None] for k in ("x", "dt", "B", "C")}
    y, last = scan(flat, config, initial_state=states.mT, cu_seqlens=bounds)
    ends = first.roll(-1).nonzero()[:, 0]  # a row's last sequence stands before the next row's first
    return y.unflatten(1, (rows, length))[0], last[ends]


@pytest.fixture
def block() -> Mamba2:
    return Mamba2(24, d_state=16, head_dim=8, groups=2, dt_limit=(0.001, 0.2))


@torch.no_grad()
def test_streaming_equals_one_pass(block):
    x = torch.randn(2, 1000, 24)
    whole, last = block(x, return_state=True)
    scale = whole.abs().max()
    state, found = block.init_state(2), []
    for t in range(1000):
        y, state = block.step(x[:, t], state)
        found.append(y)
    assert (torch.stack(found, 1) - whole).abs().max() <= 1e-5 * scale
    chunked, pieces = None, []
    for piece in x.split([1, 2, 300, 64, 633], 1):
        y, chunked = block(piece, chunked, return_state=True)
        pieces.append(y)
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5 * scale
    for got in (state, chunked):
        assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(got, last, strict=True))


@torch.no_grad()
def test_packed_equals_one_by_one(block):
    lengths = [3, 400, 1, 96]
    x = torch.randn(1, 500, 24)
    bounds = torch.tensor([0, 3, 403, 404, 500], dtype=torch.int32)
    whole, last = block(x, return_state=True, cu_seqlens=bounds)
    for i, piece in enumerate(x.split(lengths, 1)):
        y, state = block(piece, return_state=True)
        of = slice(bounds[i], bounds[i + 1])
        assert (y - whole[:, of]).abs().max() <= 1e-5 * whole.abs().max()
        torch.testing.assert_close(last.conv[i : i + 1], state.conv)
        torch.testing.assert_close(last.ssm[i : i + 1], state.ssm, rtol=1e-5, atol=1e-5)


def test_first_state_is_zero_and_step_keeps_dtype(block):
    x = torch.randn(2, 24)
    y, state = block.step(x, block.init_state(2))
    want, _ = block(x[:, None], return_state=True)
    torch.testing.assert_close(y, want[:, 0])
    assert isinstance(state, Mamba2State) and state.ssm.shape == (2, 6, 16, 8)


def test_scan_step_and_reverse():
    x, B, C = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5)
    dt, A, D = torch.rand(2, 9, 4), -torch.rand(4), torch.randn(4, 8)
    y, last = ssd(x, dt, A, B, C, D=D)
    state = torch.zeros(2, 4, 5, 8)
    for t in range(9):
        out, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(state, last)
    flipped, first = ssd(*(t.flip(1) for t in (x, dt)), A, *(t.flip(1) for t in (B, C)), D=D, reverse=True)
    torch.testing.assert_close(flipped.flip(1), y)
    torch.testing.assert_close(first, last)


def test_refusals():
    with pytest.raises(ValueError, match="head_dim 10 must divide the 48 channels"):
        Mamba2(24, head_dim=10)
    with pytest.raises(ValueError, match="4 groups must divide the 6 heads"):
        Mamba2(24, head_dim=8, groups=4)
    with pytest.raises(ValueError, match="norm must be"):
        Mamba2(24, head_dim=8, norm="layer")
