"""PreNormBlock and PreNormStack against torch's pre-norm encoder layer, and the fused chain of residuals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.transformer import PreNormBlock, PreNormStack


def test_block_is_torchs_pre_norm_layer():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        48, 4, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    ours = PreNormBlock(48, 4, 96)
    names = {"norm1": "norm1", "norm2": "norm2", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    names |= {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj"}
    state = {}
    for key, value in theirs.state_dict().items():
        old = next(name for name in names if key.startswith(name))
        state[names[old] + key.removeprefix(old)] = value
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 11, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    torch.testing.assert_close(ours(x, mask=mask), theirs(x, src_mask=~mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, causal=True), theirs(x, src_mask=~mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms", "crms"])
def test_stack_is_its_blocks_one_after_the_other(norm):
    torch.manual_seed(0)
    stack = PreNormStack(
        32, depth=3, num_heads=4, hidden_dim=40, in_dim=5, out_dim=7, norm=norm, mlp="swiglu"
    )
    x = torch.randn(2, 9, 5)
    plain = stack.embed(x)
    for block in stack.blocks:
        plain = block(plain)
    torch.testing.assert_close(stack(x), stack.head(stack.norm(plain)), rtol=1e-5, atol=1e-5)
    stack(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.parameters())


def test_stack_without_projections_or_blocks():
    x = torch.randn(2, 9, 32)
    empty = PreNormStack(32, depth=0, num_heads=4, hidden_dim=40)
    torch.testing.assert_close(empty(x), empty.norm(x))
    stack = PreNormStack(32, depth=2, num_heads=4, hidden_dim=40, num_kv_heads=2, head_dim=6)
    assert stack(x).shape == (2, 9, 32)
    block = 2 * 2 * 32 + 33 * 8 * 6 + 25 * 32 + 33 * 40 + 41 * 32  # norms, qkv, proj, fc1, fc2
    assert sum(p.numel() for p in stack.parameters()) == 2 * block + 2 * 32


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="no norm 'rmsnorm'; did you mean 'rms'"):
        PreNormBlock(32, 4, 40, norm="rmsnorm")
    with pytest.raises(UsageError, match="no activation 'swigluu'"):
        PreNormBlock(32, 4, 40, mlp="swigluu")
