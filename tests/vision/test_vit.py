"""ViT's attention on our op: masks, norms, gates, small models for small images, hooks, timm's interfaces."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.vision.models.core_attention import with_core_attention
from manyheads.vision.models.linear import FusedMlp, linear
from manyheads.vision.models.vit_attention import SelfAttention


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True, "qkv_bias": True}, {"attn_head_dim": 12}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_options_and_masks_of_attention(options):
    torch.manual_seed(0)
    theirs = Attention(32, 4, norm_layer=torch.nn.LayerNorm, **options).eval()
    ours = SelfAttention(theirs)
    x = images(2, 9, 32)
    seen = torch.rand(9, 9) < 0.7
    seen.fill_diagonal_(True)
    for kwargs in ({}, {"attn_mask": seen}, {"attn_mask": images(2, 1, 9, 9)}, {"is_causal": True}):
        assert (ours(x, **kwargs) - theirs(x, **kwargs)).abs().max() <= 1e-5


def test_dropout_of_weights_is_drawn_in_training_only():
    ours = SelfAttention(Attention(32, 4, attn_drop=0.5))
    x = images(2, 9, 32)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    ours.attn_drop.eval()
    assert torch.equal(ours(x), ours(x))


def test_a_small_model_for_small_images():
    model = create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, depth=6).eval()
    assert model(images(2, 3, 32, 32)).shape == (2, 10)
    assert model.core_attention == 6 and len(model.blocks) == 6
    assert model.pos_embed.shape == (1, 65, 192)
    maps = model.forward_intermediates(images(2, 3, 32, 32), indices=2, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 192, 8, 8)] * 2
    grey = create_model("deit3_small_patch16_224", in_chans=1, img_size=[32, 48], num_classes=0, depth=1)
    assert grey(images(1, 1, 32, 48)).shape == (1, 384)
    sizes = create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True).eval()
    assert sizes(images(1, 3, 160, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 100}, "embed_dim=100.*divisible by num_heads"),
        ("vit_tiny_patch16_224", {"img_size": 8}, "img_size=8 has not even one patch"),
        ("vit_tiny_patch16_224", {"num_classes": -1}, "num_classes must be at least 0"),
        ("vit_relpos_small_patch16_224", {"pos_drop_rate": 0.1}, "takes no argument 'pos_drop_rate'"),
        ("vit_tiny_patch16_224", {"window_size": 7}, "takes no argument 'window_size'"),
    ],
)
def test_what_does_not_fit_is_refused(name, args, message):
    with pytest.raises(UsageError, match=message):
        create_model(name, **args)


def test_the_same_on_the_meta_device_and_in_bfloat16_under_autocast():
    args = {"img_size": 32, "depth": 2, "num_classes": 3}
    with torch.device("meta"):
        model = create_model("vit_relpos_small_patch16_224", **args)
    assert all(p.is_meta for p in model.parameters())
    real = create_model("vit_relpos_small_patch16_224", **args).eval()
    assert {k: v.shape for k, v in real.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    normed = with_core_attention(timm.create_model("test_vit3")).eval()
    x = images(1, 3, 160, 160)
    with torch.no_grad():
        want = normed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (normed(x) - want).abs().max() <= 0.1 * want.abs().max()


def test_fused_kernels_give_way_to_gradients_hooks_and_other_layers():
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40)
    x = images(2, 3, 5, 24)
    want = torch.nn.functional.gelu(layer(x), approximate="tanh")
    with torch.no_grad():
        assert (linear(layer, x, "tanh") - want).abs().max() <= 1e-5
        assert (linear(layer, x[:, :, ::2], None) - layer(x[:, :, ::2])).abs().max() <= 1e-5
    assert linear(layer, x).grad_fn is not None
    seen = []
    handle = layer.register_forward_hook(lambda *call: seen.append(1))
    with torch.no_grad():
        linear(layer, x)
        handle.remove()
        assert seen == [1]
        empty = linear(layer, x[:0])
    assert empty.shape == (0, 3, 5, 40)


@pytest.mark.parametrize("activation", [torch.nn.GELU, torch.nn.ReLU, torch.nn.SiLU])
def test_mlps_give_timms_results(activation):
    torch.manual_seed(0)
    theirs = timm.layers.Mlp(16, 32, act_layer=activation, norm_layer=torch.nn.LayerNorm).eval()
    ours, x = FusedMlp(theirs), images(2, 7, 16)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() <= 1e-5
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos"])
def test_compile_and_export_give_the_same(name):
    ours = with_core_attention(timm.create_model(name)).eval()
    x = images(1, 3, 160, 160)
    with torch.no_grad():
        want = ours(x)
        found = torch.compile(ours, backend="aot_eager")(x), torch.export.export(ours, (x,)).module()(x)
    for each in found:
        assert (each - want).abs().max() <= 1e-5


def test_a_copy_is_independent():
    ours = with_core_attention(timm.create_model("test_vit")).eval()
    again = copy.deepcopy(ours)
    with torch.no_grad():
        again.blocks[0].attn.qkv.weight.zero_()
    x = images(1, 3, 160, 160)
    assert not torch.equal(again(x), ours(x))
