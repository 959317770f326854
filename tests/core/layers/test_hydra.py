"""The Hydra block against official weights, outputs and gradients, and against its matrix."""

from __future__ import annotations

import pytest
import torch

from manyheads.core.layers.hydra import Hydra
from manyheads.core.testing import assert_within

NAMES = {
    "d_model": "dim",
    "headdim": "head_dim",
    "ngroups": "groups",
    "learnable_init_states": "learn_initial_states",
}


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.float64, 2e-6, 2e-6), (torch.float32, 2e-5, 1e-4)], ids=str
)
@pytest.mark.parametrize("name", ["hydra_block_a1", "hydra_block_a2"])
def test_official_block(name, dtype, forward, backward, golden):
    case = golden("core", name)
    options = {NAMES.get(k, k): v for k, v in case.config.items() if k != "chunk_size"}
    block = Hydra(**options).to(dtype)
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


def test_a_token_reaches_both_ends():
    block = Hydra(16, d_state=8, head_dim=8, d_conv=3)
    x = torch.randn(1, 20, 16, requires_grad=True)
    for at in (0, 10, 19):
        (grad,) = torch.autograd.grad(block(x)[0, at].sum(), x)
        assert grad[0].abs().amax(-1).gt(0).all()


def test_refusals():
    with pytest.raises(ValueError, match="d_conv must be odd"):
        Hydra(16, head_dim=8, d_conv=4)
    with pytest.raises(ValueError, match="must divide the 32 channels"):
        Hydra(16, head_dim=12)
