"""MossFormer2's memory: its fast convolutions against torch's, and the cases that stop the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads.speech.models import mossformer_frames
from manyheads.speech.models.mossformer2 import MemoryBlock, MemoryBlocks, dilated_pairs, mossformer2
from manyheads.speech.models.mossformer_frames import frames_of
from manyheads.speech.models.mossformer_layers import ConvModule, MossFormerBlock, OffsetScale

SIZES = {"dim": 16, "depth": 1, "query_key_dim": 8, "group_size": 16, "inner": 12}


@pytest.mark.parametrize("frames", [1, 2, 37, 38, 75, 76, 77, 300])
def test_dilated_pairs_are_the_grouped_dilated_convolution(frames):
    x = torch.randn(2, frames, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 2, 39, dtype=torch.float64, requires_grad=True)
    image = F.pad(x.transpose(1, 2)[..., None], (0, 0, 38, 38))  # [B, C, S, 1]
    wanted = F.conv2d(image, weight[..., None], dilation=(2, 1), groups=12)[..., 0].transpose(1, 2)
    found = dilated_pairs(x, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, (x, weight), cotangent) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
    single = dilated_pairs(x.detach().float(), weight.detach().float())  # by the compiled loops
    torch.testing.assert_close(single.double(), wanted.detach(), rtol=1e-5, atol=1e-4)


def test_one_frame_has_no_variance():
    """The published code stops there (inputs of up to 23 samples); a memory's norms give their shifts."""
    model = mossformer2(**SIZES).eval()
    block = MemoryBlock(16, 12).eval()
    x = torch.randn(3, 1, 16)
    net = block.gated_fsmn.fsmn.conv
    y = net(torch.randn(3, 1, 12))
    expected = torch.where(net.norm2.bias > 0, net.norm2.bias, net.prelu2.weight * net.norm2.bias)
    torch.testing.assert_close(y, expected.expand(3, 1, -1))
    assert block(x).isfinite().all()
    mixture = torch.randn(2, 20, requires_grad=True)
    model(mixture).sum().backward()
    assert mixture.grad.isfinite().all()


def test_a_mapping_network_gives_the_features_themselves():
    """As the published model for WHAMR! does: the same weights, no product with the mixture's features."""
    masking, mapping = (mossformer2(**SIZES, mapping=flag).double().eval() for flag in (False, True))
    mapping.load_state_dict(masking.state_dict(), strict=True)
    mixture = torch.randn(2, 400, dtype=torch.float64)
    features = masking.enc(mixture)
    masks = masking.mask_net(features).permute(2, 0, 3, 1)  # [speakers, B, N, S]
    for model, parts in ((masking, features.transpose(1, 2) * masks), (mapping, masks)):
        sources = model(mixture)
        for i, part in enumerate(parts):
            torch.testing.assert_close(model.dec(part)[:, 0], sources[:, i, : 8 * part.shape[2] + 8])
    assert not torch.allclose(masking(mixture), mapping(mixture))


def test_three_speakers():
    assert mossformer2(num_spks=3, **SIZES)(torch.randn(1, 500)).shape == (1, 3, 500)


@pytest.mark.parametrize("lengths", [None, (1500, 700), (900, 1500)])
@pytest.mark.parametrize("part", ["module", "block", "memory", "blocks"])
def test_stripes_of_a_long_recording_are_the_whole(part, lengths, monkeypatch):
    # without gradients a CPU goes over stretches of frames, some of which meet a row's end
    monkeypatch.setattr(mossformer_frames, "STRIPE", 600)  # of two rows: 300
    torch.manual_seed(0)
    sizes = {"dim": 24, "query_key_dim": 8, "group_size": 16, "dropout": 0.1}
    module = {
        "module": lambda: ConvModule(24, 40, "scale", 0.1),
        "block": lambda: MossFormerBlock(**sizes),
        "memory": lambda: MemoryBlock(24, 12, 0.1),
        "blocks": lambda: MemoryBlocks(depth=2, inner=12, **sizes),
    }[part]()
    for each in module.modules():
        if isinstance(each, OffsetScale):  # from the first draw on attention would be next to nothing
            torch.nn.init.normal_(each.gamma)
    module.eval()
    x = torch.randn(2, 1500, 24)
    frames = None if lengths is None else frames_of(torch.tensor(lengths), 1500)
    whole = module(x, frames)  # with gradients: at once
    with torch.no_grad():
        striped = module(x, frames)
    assert whole.requires_grad and not striped.requires_grad
    for row, length in enumerate(lengths or (1500, 1500)):
        torch.testing.assert_close(striped[row, :length], whole[row, :length], atol=5e-6, rtol=2e-5)
