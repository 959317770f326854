"""MaxViT's and CoAtNet's convolution block; batch norms and GELUs are in the convolutions at inference."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.padding import pad_same
from timm.models.maxxvit import MbConvBlock
from torch import Tensor, nn

from manyheads.vision.models.linear import fusible, gelu_of


def convolve(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution, batch norm and activation; at inference on a CPU in one pass.

    The norm's fixed scale is multiplied into the weights in every call: they are small beside the image, and
    nothing is kept that could go stale.

    Shape:
        `[B, C, H, W]` to `[B, C', H', W']`.
    """
    gelu = _foldable(norm)
    same = type(conv) is Conv2dSame
    if (
        gelu is None
        or not fusible(conv, x, Conv2dSame if same else nn.Conv2d)
        or conv.padding_mode != "zeros"
    ):
        return norm(conv(x))
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    if same:
        x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    padding = (0, 0) if same else conv.padding
    if isinstance(padding, str):
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = offset * scale + norm.bias if norm.affine else offset * scale
    kind = ("none", "") if not gelu else ("gelu", gelu)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight * scale.view(-1, 1, 1, 1), bias, padding, conv.stride, conv.dilation, conv.groups,
        kind[0], [], kind[1],
    )  # fmt: skip
    return out


def _foldable(norm: nn.Module) -> str | None:
    """The GELU behind a batch norm with fixed statistics, "" if there is none; None if that is another."""
    if type(norm) is not BatchNormAct2d or norm.training or norm.running_mean is None:
        return None
    if norm._forward_hooks or norm._forward_pre_hooks or type(norm.drop) is not nn.Identity:
        return None
    activation: nn.Module = norm.act  # type: ignore[assignment]
    return "" if type(activation) is nn.Identity else gelu_of(activation)


class FoldedMbConv(nn.Module):
    """Inverted bottleneck of MaxViT and CoAtNet; replaces timm's `MbConvBlock`.

    Args:
        old: timm's block, whose layers it takes over.

    Shape:
        `[B, C, H, W]` to `[B, C', H', W']`.

    Source:
        Sandler et al. 2018 (arXiv 1801.04381); Tu et al. 2022 (arXiv 2204.01697).
    """

    shortcut: nn.Module
    pre_norm: nn.Module
    down: nn.Module
    conv1_1x1: nn.Module
    norm1: nn.Module
    conv2_kxk: nn.Module
    norm2: nn.Module
    conv3_1x1: nn.Module
    drop_path: nn.Module

    def __init__(self, old: MbConvBlock) -> None:
        super().__init__()
        for name, layer in old._modules.items():
            self.add_module(name, layer)
        self.se_early, self.se = old.se_early, old.se

    def forward(self, x: Tensor) -> Tensor:
        """Expand, convolve each channel, squeeze and excite, project back, add.

        At inference on a CPU the image is laid out channels last, as the attention blocks leave it.
        """
        if fusible(self.conv1_1x1, x, nn.Conv2d):
            x = x.contiguous(memory_format=torch.channels_last)
        shortcut = self.shortcut(x)
        x = convolve(self.conv1_1x1, self.norm1, self.down(self.pre_norm(x)))
        if self.se_early is None:
            x = convolve(self.conv2_kxk, self.norm2, x)
        else:
            x = self.norm2(self.se_early(self.conv2_kxk(x)))
        if self.se is not None:
            x = self.se(x)
        return self.drop_path(self.conv3_1x1(x)) + shortcut
