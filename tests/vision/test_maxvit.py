"""MaxViT's blocks on our ops: folded norms, partitions of both layouts, resizing, refusals."""

import copy

import pytest
import timm
import torch
from timm.models.maxxvit import MbConvBlock

from manyheads.core.catalog import create_model
from manyheads.core.errors import UsageError
from manyheads.vision.models.core_attention import with_core_attention
from manyheads.vision.models.maxvit_blocks import ParallelPartitionAttention, PartitionAttention
from manyheads.vision.models.mbconv import FoldedMbConv

SMALL = {"img_size": 64, "embed_dim": (32, 64), "depths": (1, 1), "block_type": ("M", "M"), "num_classes": 5}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "table" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            if "running_var" in name:
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def pair(name, **args):
    theirs = randomised(timm.create_model(name, **(SMALL | args))).eval()
    return with_core_attention(copy.deepcopy(theirs)), theirs


def same(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    assert (found - want).abs().max() <= tolerance * max(1, want.abs().max())


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
def test_layouts(memory, nchw, head_first):
    ours, theirs = pair(
        "maxvit_tiny_tf_224", transformer_use_nchw_attn=nchw, transformer_head_first=head_first
    )
    x = images(2, 3, 64, 64).to(memory_format=memory)
    same(ours(x), theirs(x))
    with torch.no_grad():
        same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "maxvit_rmlp_pico_rw_256", "coatnet_0_rw_224"])
def test_set_input_size_and_new_weights_are_followed(name):
    args = {"block_type": ("C", "T")} if "coatnet" in name else {}
    ours, theirs = pair(name, **args)
    with torch.no_grad():
        ours(images(1, 3, 64, 64))  # nothing of these weights may remain
        for model in (ours, theirs):
            for p in model.parameters():
                p.data.mul_(0.9)
            model.set_input_size(img_size=(96, 128))
        x = images(2, 3, 96, 128)
        same(ours(x), theirs(x))


@pytest.mark.parametrize("which", [0, 1], ids=["stride 2", "stride 1"])
@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "coatnet_0_rw_224", "coatnet_nano_cc_224"])
def test_the_convolution_block(name, which):
    model = randomised(timm.create_model(name, img_size=64, depths=(2, 1, 1, 1))).eval()
    theirs = [m for m in model.modules() if isinstance(m, MbConvBlock)][which]
    ours = FoldedMbConv(copy.deepcopy(theirs)).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(2, theirs.conv1_1x1.in_channels, 14, 14)
    with torch.no_grad():
        same(ours(x), theirs(x))
        same(ours.train()(x), theirs.train()(x))  # statistics of the batch, and they are kept
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        same(a.float(), b.float())
    assert ours.norm1.num_batches_tracked == 1


def test_dropout_of_weights_is_drawn_in_training_only():
    model = create_model("maxvit_tiny_tf_224", img_size=64, depths=[1, 1, 1, 1], attn_drop_rate=0.5).eval()
    blocks = [m for m in model.modules() if isinstance(m, PartitionAttention)]
    assert len(blocks) == 8 and all(block.attn.attn_drop.p == 0.5 for block in blocks)
    x = images(1, 16, 16, 64)
    assert torch.equal(blocks[0](x), blocks[0](x))
    blocks[0].train()
    assert not torch.equal(blocks[0](x), blocks[0](x))


def test_windows_and_grids_side_by_side():
    model = with_core_attention(timm.create_model("maxvit_tiny_pm_256", depths=(1, 1, 1, 1), img_size=64))
    assert sum(isinstance(m, ParallelPartitionAttention) for m in model.modules()) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_size": 64, "window_size": 5}, r"\[5, 5\] tokens do not divide a feature map of \[16, 16\]"),
        ({"embed_dim": [16, 16]}, r"embed_dim=\[16, 16\]"),
        ({"dim_head": 48}, "dim_head=48"),
    ],
)
def test_what_does_not_fit_is_refused(args, message):
    with pytest.raises(UsageError, match=message):
        create_model("maxvit_tiny_tf_224", **args)


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet"])
def test_compile_and_export_give_the_same(name):
    ours = randomised(with_core_attention(timm.create_model(name))).eval()
    x = images(1, 3, 160, 160)
    with torch.no_grad():
        want = ours(x)
        found = torch.compile(ours, backend="aot_eager")(x), torch.export.export(ours, (x,)).module()(x)
    for each in found:
        same(each, want)
