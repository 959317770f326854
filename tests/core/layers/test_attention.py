"""MultiHeadAttention against torch's with the same weights, and against the op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.core.layers.attention import MultiHeadAttention
from manyheads.core.ops.attention import reference


def pair(dim: int = 48, heads: int = 4) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = MultiHeadAttention(dim, heads)
    state = {
        "qkv.weight": theirs.in_proj_weight,
        "qkv.bias": theirs.in_proj_bias,
        "proj.weight": theirs.out_proj.weight,
        "proj.bias": theirs.out_proj.bias,
    }
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def run_both(ours, theirs, found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, (ours.qkv.weight, ours.qkv.bias, ours.proj.weight), cotangent)
    other = torch.autograd.grad(
        wanted, (theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight), cotangent
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_self_attention_is_torchs():
    ours, theirs = pair()
    x = torch.randn(2, 13, 48)
    run_both(ours, theirs, ours(x), theirs(x, x, x, need_weights=False)[0])


def test_cross_attention_with_a_mask_is_torchs():
    ours, theirs = pair()
    x, context = torch.randn(2, 5, 48), torch.randn(2, 9, 48)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    wanted = theirs(x, context, context, key_padding_mask=padding, need_weights=False)[0]
    run_both(ours, theirs, ours(x, context, mask=~padding[:, None, None]), wanted)


def test_causal_and_a_learned_bias_are_torchs():
    ours, theirs = pair()
    x = torch.randn(2, 13, 48)
    bias = torch.randn(4, 13, 13, requires_grad=True)
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    additive = bias.masked_fill(future, float("-inf")).repeat(2, 1, 1)
    wanted = theirs(x, x, x, attn_mask=additive, need_weights=False)[0]
    found = ours(x, bias=bias, causal=True)
    run_both(ours, theirs, found, wanted)


def test_gradient_of_a_learned_bias():
    ours, _ = pair()
    x, bias = torch.randn(2, 7, 48), torch.randn(4, 7, 7, requires_grad=True)
    q, k, v = (t.unflatten(-1, (4, 12)) for t in ours.qkv(x).chunk(3, -1))
    wanted = ours.proj(reference.attention(q, k, v, bias=bias).flatten(2))
    cotangent = torch.randn_like(wanted)
    found = torch.autograd.grad(ours(x, bias=bias), bias, cotangent)[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, bias, cotangent)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_grouped_queries_repeat_keys_and_values(kind):
    torch.manual_seed(0)
    layer = MultiHeadAttention(48, 6, num_kv_heads=2, head_dim=16, kind=kind)
    x, scale = torch.randn(2, 7, 48), torch.rand(6, 7, 7)
    q, k, v = layer.qkv(x).split([96, 32, 32], dim=-1)
    k, v = (t.unflatten(-1, (2, 16)).repeat_interleave(3, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.unflatten(-1, (6, 16)), k) / 4
    weights = scores.softmax(-1) if kind == "softmax" else torch.sigmoid(scores - torch.tensor(7.0).log())
    wanted = layer.proj(torch.einsum("bhqk,bkhd->bqhd", weights * scale, v).flatten(2))
    torch.testing.assert_close(layer(x, post_scale=scale), wanted, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 49 * 160 + 97 * 48


def test_no_bias_with_a_context():
    layer = MultiHeadAttention(16, 2, qkv_bias=False, proj_bias=False)
    x = torch.randn(1, 3, 16)
    torch.testing.assert_close(layer(x, x), layer(x))
    assert set(layer.state_dict()) == {"qkv.weight", "proj.weight"}


def test_dropout_only_in_training():
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 2, dropout=0.5), torch.randn(1, 9, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_refusals():
    with pytest.raises(ValueError, match="dim 50 is not a multiple of num_heads 4"):
        MultiHeadAttention(50, 4)
    with pytest.raises(ValueError, match="not a multiple of num_kv_heads 3"):
        MultiHeadAttention(48, 4, num_kv_heads=3)
