"""The blocks of Swin, Swin V2 and its CR variant on our window attention: no roll, no partition.

A block is made from timm's and keeps its layers under their names. The layer `attn` stays timm's: it holds
the projections and the bias of relative positions, and resizes it, while the block attends, on the image as
it lies. Where a shifted window joins opposite borders, timm adds -100 to the scores; here tokens do not see
each other, which is the same unless scores differ by about as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

from manyheads.vision.models.linear import linear
from manyheads.vision.models.windows import attend_windows, dropout_of

LARGEST = math.log(100.0)  # of a learned logarithm of the scale, in Swin V2


class Scores(NamedTuple):
    """What window attention needs: images of q, k, v `[B, H, W, heads, D]`, bias `[heads, n, n]`, scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    scale: float


def scores(attn: swin_transformer.WindowAttention, x: Tensor) -> Scores:
    """Project as Swin does: scaled products, and a table of biases."""
    q, k, v = linear(attn.qkv, x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    return Scores(q, k, v, attn._get_rel_pos_bias()[0], attn.scale)


def scores_v2(attn: swin_transformer_v2.WindowAttention, x: Tensor) -> Scores:
    """Project as Swin V2 does: cosines, and a bias from a small network over log-spaced coordinates."""
    qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if qkv_bias is not None and attn.qkv_bias_separate:
        qkv = attn.qkv(x) + qkv_bias
    else:
        qkv = F.linear(x, attn.qkv.weight, qkv_bias)
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    bias = table[attn.relative_position_index].permute(2, 0, 1)  # [heads, n, n]
    return _cosines(qkv, attn, 16 * torch.sigmoid(bias))


def scores_v2_cr(attn: swin_transformer_v2_cr.WindowMultiHeadAttention, x: Tensor) -> Scores:
    """Project as timm's variant of Swin V2 does: cosines, and a bias from a network over log coordinates."""
    return _cosines(linear(attn.qkv, x), attn, attn._relative_positional_encodings()[0])


def _cosines(qkv: Tensor, attn: Any, bias: Tensor) -> Scores:
    """Normalise q and k, and fold the learned scale of each head into q."""
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    scale = attn.logit_scale.clamp(max=LARGEST).exp().view(attn.num_heads, 1)
    return Scores(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, bias, 1.0)


PROJECT = {
    swin_transformer.WindowAttention: scores,
    swin_transformer_v2.WindowAttention: scores_v2,
    swin_transformer_v2_cr.WindowMultiHeadAttention: scores_v2_cr,
}


class SwinBlock(nn.Module):
    """A block of any of the three kinds; replaces timm's.

    Args:
        old: timm's block, whose layers it takes over.

    Shape:
        `[B, H, W, C]` to `[B, H, W, C]`, any H and W.

    Source:
        Liu et al. 2021 (arXiv 2103.14030), 2022 (arXiv 2111.09883).
    """

    norm1: nn.Module
    norm2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    mlp: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        old: swin_transformer.SwinTransformerBlock
        | swin_transformer_v2.SwinTransformerV2Block
        | swin_transformer_v2_cr.SwinTransformerV2CrBlock,
    ) -> None:
        super().__init__()
        self.dim = old.dim
        self.input_resolution = old.input_resolution if hasattr(old, "input_resolution") else old.feat_size
        self.target_shift_size, self.always_partition = old.target_shift_size, old.always_partition
        self.window_size: tuple[int, int] = old.window_size
        self.shift_size: tuple[int, int] = old.shift_size
        self.pre_norm = isinstance(old, swin_transformer.SwinTransformerBlock)
        for name, layer in old._modules.items():  # their order, which optimizers count by, differs
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Attend in windows, then the MLP; norms before them in Swin, after them in Swin V2."""
        if self.pre_norm:
            x = x + self.drop_path1(self.attend(self.norm1(x)))
            return x + self.drop_path2(self.mlp(self.norm2(x)))
        x = x + self.drop_path1(self.norm1(self.attend(x)))
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return self.norm3(x) if hasattr(self, "norm3") else x

    def attend(self, x: Tensor) -> Tensor:
        """Attend inside the windows of an image.

        An image that windows do not divide is padded with zeros, which take part, as in timm. timm rolls
        before it pads, so that the padding lies inside the rolled image: this is undone before the op.
        """
        attn: Any = self.attn
        height, width = x.shape[1:3]
        (window_h, window_w), shift = self.window_size, self.shift_size
        pad = (-height % window_h, -width % window_w)
        moved = any(pad) and any(shift)
        if moved:
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        if any(pad):
            x = F.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
        if moved:
            x = torch.roll(x, shift, (1, 2))
        q, k, v, bias, scale = PROJECT[type(attn)](attn, x)
        out = attend_windows(
            q, k, v, self.window_size, shift=shift, bias=bias, scale=scale,
            dropout_p=dropout_of(attn.attn_drop),
        ).flatten(3)  # fmt: skip
        if moved:
            out = torch.roll(out, (-shift[0], -shift[1]), (1, 2))
        if any(pad):
            out = out[:, :height, :width]
        if moved:
            out = torch.roll(out, shift, (1, 2))
        return attn.proj_drop(linear(attn.proj, out))

    def set_input_size(
        self,
        feat_size: tuple[int, int],
        window_size: int | Sequence[int],
        always_partition: bool | None = None,
    ) -> None:
        """Change the size of image and windows; timm's model calls this.

        Args:
            feat_size: Height and width of the block's input in tokens.
            window_size: Of the windows; smaller where the image is.
            always_partition: Keep windows that are larger than the image; None leaves it as it is.
        """
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        window: tuple[int, int] = to_2tuple(window_size)
        shift = (window[0] // 2, window[1] // 2) if any(self.target_shift_size) else (0, 0)
        if not self.always_partition:
            window = (min(feat_size[0], window[0]), min(feat_size[1], window[1]))
            shift = tuple(  # type: ignore[assignment]
                0 if size <= part else by for size, part, by in zip(feat_size, window, shift, strict=True)
            )
        self.window_size, self.shift_size = window, shift
        attn: Any = self.attn
        attn.set_window_size(window)  # resizes the table of biases
