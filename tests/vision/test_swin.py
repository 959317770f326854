"""Swin's blocks on our window attention: odd sizes, resizing, dropout, and timm's interfaces."""

import copy

import pytest
import timm
import torch

from manyheads.core import hub
from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.core.ops import attention
from manyheads.vision.models import windows
from manyheads.vision.models.core_attention import with_core_attention
from manyheads.vision.models.swin_blocks import SwinBlock

SMALL = {
    "img_size": 64,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "table" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def pair(name, **args):
    theirs = randomised(timm.create_model(name, **(SMALL | args))).eval()
    return with_core_attention(copy.deepcopy(theirs)), theirs


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def same(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    assert (found - want).abs().max() <= tolerance * max(1, want.abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (68, 100), (40, 72)])
def test_sizes_that_windows_do_not_divide(name, size):
    ours, theirs = pair(name, img_size=size, window_size=6)
    x = images(2, 3, *size).requires_grad_()
    out, want = ours(x), theirs(x)
    same(out, want)
    cotangent = images(*want.shape)
    found, wanted = (torch.autograd.grad(y, x, cotangent)[0] for y in (out, want))
    same(found / wanted.abs().max(), wanted / wanted.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_any_size_at_call_time_and_windows_larger_than_the_image(name):
    ours, theirs = pair(name, window_size=6, strict_img_size=False, always_partition=True)
    for size in ((64, 64), (36, 52), (16, 16)):
        x = images(1, 3, *size)
        with torch.no_grad():
            same(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_set_input_size_resizes_as_timm_does(name):
    ours, theirs = pair(name, window_size=8)
    for model in (ours, theirs):
        model.set_input_size(img_size=(96, 80), window_size=6)
    x = images(1, 3, 96, 80)
    same(ours(x), theirs(x))
    assert [b.shift_size for b in ours.modules() if isinstance(b, SwinBlock)] == [
        b.shift_size for b in theirs.modules() if hasattr(b, "shift_size")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_features_checkpointing_and_a_new_classifier(name):
    ours, theirs = pair(name, window_size=4)
    x = images(2, 3, 64, 64)
    found, wanted = (m.forward_intermediates(x, intermediates_only=True) for m in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        same(a, b)
    found = []
    for enable in (False, True):
        ours.train().set_grad_checkpointing(enable)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(ours(x).square().sum(), ours.patch_embed.parameters()))
    for a, b in zip(*found, strict=True):
        same(a / b.abs().max(), b / b.abs().max())
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_weights_is_drawn_in_training_only(name, monkeypatch):
    ours, theirs = pair(name, window_size=4, attn_drop_rate=0.5)
    x = images(2, 3, 64, 64)
    same(ours(x), theirs(x))  # none in evaluation
    block = next(b for b in ours.modules() if isinstance(b, SwinBlock) and any(b.shift_size))
    tokens = images(2, 16, 16, 24)
    want = block.attend(tokens)
    block.attn.attn_drop.train()
    assert not torch.equal(block.attend(tokens), block.attend(tokens))
    chances = []

    def without(*parts, dropout_p, **options):
        chances.append(dropout_p)
        return attention(*parts, **options)

    monkeypatch.setattr(windows, "attention", without)
    same(block.attend(tokens), want)  # the path with dropout, without it
    assert chances == [0.5]


def test_with_core_attention_says_what_it_did():
    ours, _ = pair(NAMES[0])
    assert ours.core_attention == 4
    assert with_core_attention(ours).core_attention == 4  # once more changes nothing
    nested = with_core_attention(torch.nn.Sequential(timm.create_model(NAMES[0], **SMALL)))
    assert nested.core_attention == 4
    with pytest.raises(UsageError, match="ResNet has no attention"):
        with_core_attention(timm.create_model("resnet18"))


def test_a_model_folder_comes_back(tmp_path):
    args = {"img_size": 64, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "num_classes": 4}
    model = randomised(create_model("swinv2_cr_tiny_224", **args)).eval()
    hub.save(
        tmp_path / "m", model, domain="vision", name="swinv2_cr_tiny_224", arguments=args, preprocessing={}
    )
    again, _ = hub.load_model(tmp_path / "m")
    x = images(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"window_size": 0}, "window_size must be positive"),
        ({"img_size": 2}, "img_size=2"),
        ({"depths": [0, 2]}, "depths must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"global_pool": "median"}, "global_pool='median'"),
    ],
)
def test_what_does_not_fit_is_refused(args, message):
    with pytest.raises(UsageError, match=message):
        create_model(NAMES[0], **args)


@pytest.mark.parametrize("name", NAMES[:2])
def test_compile_and_export_give_the_same(name):
    ours, _ = pair(name, window_size=4)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        want = ours(x)
        same(torch.compile(ours, backend="aot_eager")(x), want)
        same(torch.export.export(ours, (x,)).module()(x), want)
