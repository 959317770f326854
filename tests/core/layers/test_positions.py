"""Positions against timm's and transformers' own, and what makes each of them what it is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from manyheads.core.errors import UsageError
from manyheads.core.layers.position_bias import (
    AlibiBias,
    BucketBias,
    RelativePositionBias,
    alibi_slopes,
    bucket_of,
    relative_position_index,
    relative_positions,
    resize_relative_table,
)
from manyheads.core.layers.positions import (
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
    frequencies,
    resize_position_embedding,
    rotate,
    sinusoidal_positions,
    sinusoidal_positions_2d,
)
from manyheads.core.ops.attention import attention


def test_learned_positions():
    layer = LearnedPositions(10, 4)
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(layer(x, offset=3), x + layer.weight[3:9])
    parts = torch.cat([layer(x[:, :2]), layer(x[:, 2:], offset=2)], 1)
    assert torch.equal(parts, layer(x))
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad[:, 0], torch.tensor([2.0] * 6 + [0.0] * 4))
    with pytest.raises(ValueError, match="positions 5 to 10: the table has 10"):
        layer(x, offset=5)


def test_sinusoids_are_the_formula():
    table = sinusoidal_positions(torch.arange(50), 8).double()
    angles = torch.arange(50).double()[:, None] / 10000 ** (torch.arange(4).double() / 4)
    torch.testing.assert_close(table[:, 0::2], angles.sin(), rtol=0, atol=3e-6)
    torch.testing.assert_close(table[:, 1::2], angles.cos(), rtol=0, atol=3e-6)
    halves = sinusoidal_positions(torch.arange(50), 8, interleaved=False)
    assert torch.equal(halves, torch.cat([table[:, 0::2], table[:, 1::2]], 1).float())
    closed = frequencies(8, 10000.0, closed=True)
    torch.testing.assert_close(closed[[0, -1]], torch.tensor([1.0, 1e-4]))
    torch.testing.assert_close(frequencies(8)[-1].item(), 10000**-0.75)


def test_sinusoidal_layer_streams_and_keeps_the_dtype():
    layer = SinusoidalPositions(8, interleaved=False, closed=True)
    x = torch.randn(2, 9, 8)
    parts = torch.cat([layer(x[:, :4]), layer(x[:, 4:], offset=4)], 1)
    assert torch.equal(parts, layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not layer.state_dict()
    for dim, closed in ((7, False), (0, False), (2, True)):
        with pytest.raises(ValueError, match="dim must be even"):
            SinusoidalPositions(dim, closed=closed)


def test_2d_sinusoids_are_timms():
    sincos = pytest.importorskip("timm.layers.pos_embed_sincos")
    table = sinusoidal_positions_2d(3, 5, 16)
    want = sincos.build_sincos2d_pos_embed([3, 5], 16, interleave_sin_cos=True)  # rows, then columns
    torch.testing.assert_close(table.flatten(0, 1), want, rtol=0, atol=1e-6)
    assert torch.equal(sinusoidal_positions_2d(3, 5, 16, x_first=True), table.roll(8, -1))
    with pytest.raises(ValueError, match="multiple of 4"):
        sinusoidal_positions_2d(3, 5, 6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_timms(interleaved):
    sincos = pytest.importorskip("timm.layers.pos_embed_sincos")
    x = torch.randn(2, 7, 3, 8)
    angles = torch.arange(7.0)[:, None] * frequencies(8)
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    sin, cos = (t[:, None] for t in (wide.sin(), wide.cos()))
    want = sincos.apply_rot_embed(x, sin, cos, half=not interleaved)
    torch.testing.assert_close(RotaryPositions(8, interleaved=interleaved)(x), want)


def test_rotary_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.randn(1), torch.arange(20)[None])
    q, k = torch.randn(2, 1, 20, 4, 8)
    want, _ = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(RotaryPositions(8)(q), want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_alone(interleaved):
    rotary = RotaryPositions(6, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(-1, -1, 12, -1, -1)
    scores = torch.einsum("bihd,bjhd->ij", rotary(q), rotary(k, offset=3))
    for distance in range(-11, 12):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 1], atol=1e-3)


def test_rotary_partial_offset_positions_and_shapes():
    rotary = RotaryPositions(4)
    x = torch.randn(2, 9, 3, 10)
    out = rotary(x)
    assert torch.equal(out[..., 4:], x[..., 4:]) and torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(torch.cat([rotary(x[:, :5]), rotary(x[:, 5:], offset=5)], 1), out)
    torch.testing.assert_close(rotary(x[:, :, 0]), out[:, :, 0])  # [B, N, D]
    own = torch.stack([torch.arange(9), torch.arange(9).flip(0)])
    each = rotary(x, positions=own)
    torch.testing.assert_close(each[0], out[0])
    torch.testing.assert_close(each[1], rotary(x.flip(1)).flip(1)[1])
    torch.testing.assert_close(rotary(x, offset=2, positions=torch.arange(9)), rotary(x, offset=2))
    assert rotary(x.bfloat16()).dtype == torch.bfloat16
    cos, sin = torch.ones(2), torch.zeros(2)
    assert torch.equal(rotate(x, cos, sin, interleaved=True), x)
    with pytest.raises(ValueError, match="dim must be even"):
        RotaryPositions(5)
    with pytest.raises(ValueError, match="with D >= 4"):
        rotary(x[..., :3])


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16])
def test_alibi_slopes_are_blooms(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mask = torch.ones(1, 5, dtype=torch.int64)
    per_key = bloom.build_alibi_tensor(mask, heads, torch.float32).view(heads, 5)
    torch.testing.assert_close(alibi_slopes(heads), per_key[:, 1])


def test_alibi_bias():
    layer = AlibiBias(4)
    bias = layer(5, 7)
    assert bias.shape == (4, 5, 7) and bias.eq(0).sum() == 4 * 5
    assert bias[1, 4, 6] == 0 and bias[1, 0, 0] == -2 * 0.0625  # slopes 2^-2, 2^-4, ...
    assert torch.equal(layer(6), layer(6).transpose(1, 2)) and not layer.state_dict()
    with pytest.raises(ValueError, match="at least 1"):
        alibi_slopes(0)
    # causal attention: the last queries of a longer sequence get the rows that they had in it
    assert torch.equal(layer(7)[:, 2:], bias)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 20), (8, 100)])
def test_buckets_are_t5s(bidirectional, buckets, distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        num_heads=3,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        is_decoder=not bidirectional,
    )
    theirs = t5.T5Attention(config, has_relative_attention_bias=True)
    ours = BucketBias(3, num_buckets=buckets, max_distance=distance, bidirectional=bidirectional)
    ours.load_state_dict({"relative_attention_bias.weight": theirs.relative_attention_bias.weight})
    assert torch.equal(ours(300), theirs.compute_bias(300, 300)[0])
    assert torch.equal(ours(1, 40), ours(40)[:, -1:])  # one step of decoding


def test_buckets_refuse_what_leaves_no_room():
    with pytest.raises(ValueError, match="leave no room"):
        BucketBias(2, num_buckets=2)
    with pytest.raises(ValueError, match="leave no room"):
        bucket_of(torch.zeros(1, dtype=torch.int64), 32, 8)


def test_relative_positions_end_together():
    assert relative_positions(2, 4).tolist() == [[-2, -1, 0, 1], [-3, -2, -1, 0]]


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 4), (1, 1)])
def test_tables_are_timms(window):
    rel = pytest.importorskip("timm.layers.pos_embed_rel")
    assert torch.equal(relative_position_index(*window), rel.gen_relative_position_index(window))
    theirs, ours = rel.RelPosBias(window, 3), RelativePositionBias(window, 3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(), theirs.get_bias()[0])
    theirs, ours = rel.RelPosBiasTf(window, 3), RelativePositionBias(window, 3, order="maxvit")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(), theirs.get_bias(), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["swin", "maxvit"])
@pytest.mark.parametrize(
    ("old", "new"), [((7, 7), (12, 12)), ((7, 7), (3, 10)), ((4, 6), (8, 8)), ((3, 3), (3, 3))]
)
def test_resized_tables_are_timms(old, new, order):
    rel = pytest.importorskip("timm.layers.pos_embed_rel")
    theirs = (rel.RelPosBias if order == "swin" else rel.RelPosBiasTf)(old, 3)
    ours = RelativePositionBias(old, 3, order=order)
    ours.load_state_dict(theirs.state_dict())
    theirs.set_window_size(new)
    ours.resize(new)
    table = theirs.relative_position_bias_table
    torch.testing.assert_close(ours.relative_position_bias_table, table, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours(), theirs.get_bias().view(3, *ours().shape[1:]), rtol=0, atol=1e-6)
    assert ours.window == new and ours.relative_position_bias_table.requires_grad


def test_resized_tables_bicubic():
    rel = pytest.importorskip("timm.layers.pos_embed_rel")
    for shape, new_shape in (((169, 3), (529, 3)), ((3, 13, 13), (3, 23, 23))):
        table = torch.randn(shape)
        want = rel.resize_rel_pos_bias_table_simple(table, (12, 12), new_shape)
        found = resize_relative_table(table, (7, 7), (12, 12), method="bicubic")
        torch.testing.assert_close(found, want)
    grown = resize_relative_table(torch.randn(1, 2), (1, 1), (2, 2))
    assert grown.shape == (9, 2) and torch.equal(grown, grown[:1].expand(9, 2))


def test_tables_refuse():
    with pytest.raises(ValueError, match="no table of a window"):
        resize_relative_table(torch.randn(169, 3), (8, 8), (7, 7))
    with pytest.raises(UsageError, match="did you mean 'bicubic'"):
        resize_relative_table(torch.randn(169, 3), (7, 7), (8, 8), method="bicubi")
    with pytest.raises(UsageError, match="no order 'swim'"):
        RelativePositionBias((7, 7), 3, order="swim")


def test_a_table_learns_through_attention():
    layer = RelativePositionBias((2, 3), 2)
    q, k, v = torch.randn(3, 4, 6, 2, 8)
    cotangent = torch.randn(4, 6, 2, 8)
    attention(q, k, v, bias=layer()).backward(cotangent)
    found = layer.relative_position_bias_table.grad
    table = layer.relative_position_bias_table.detach().double().requires_grad_()
    bias = table[relative_position_index(2, 3)].permute(2, 0, 1)
    out = attention(q.double(), k.double(), v.double(), bias=bias)
    (want,) = torch.autograd.grad(out, table, cotangent.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)


def test_resized_embeddings_are_timms():
    pos_embed = pytest.importorskip("timm.layers.pos_embed")
    table = torch.randn(1, 1 + 36, 8)
    want = pos_embed.resample_abs_pos_embed(table, [9, 4], num_prefix_tokens=1)
    torch.testing.assert_close(resize_position_embedding(table, (9, 4), extra=[0]), want)
    oblong = torch.randn(1, 24, 8)
    want = pos_embed.resample_abs_pos_embed(oblong, [3, 3], [4, 6], num_prefix_tokens=0, antialias=False)
    found = resize_position_embedding(oblong, (3, 3), old_size=(4, 6), antialias=False)
    torch.testing.assert_close(found, want)


def test_a_class_token_in_the_middle_stays_there():
    table = torch.randn(17, 8)
    found = resize_position_embedding(table, (6, 6), extra=[8], new_extra=[18])
    assert torch.equal(found[18], table[8])
    grid = table[[i for i in range(17) if i != 8]].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2)[0].t()
    torch.testing.assert_close(found[[i for i in range(37) if i != 18]], grid)
    assert torch.equal(resize_position_embedding(table, (4, 4), extra=[8]), table)
    with pytest.raises(ValueError, match="17 rows are not 4 x 4 and 0 extra"):
        resize_position_embedding(table, (6, 6))
    with pytest.raises(ValueError, match=r"\[40\] are not 1 rows below 37"):
        resize_position_embedding(table, (6, 6), extra=[8], new_extra=[40])


def test_slopes_end_where_the_paper_ends():
    for heads in (1, 4, 8, 16):
        assert math.isclose(alibi_slopes(heads)[-1].item(), 2**-8)
