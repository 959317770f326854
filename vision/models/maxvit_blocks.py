"""The attention of MaxViT and CoAtNet on our ops: windows and grids are read from the image as it lies.

A block is made from timm's and keeps its layers under their names. The layers `attn` of the partitioned
blocks stay timm's: they hold the projections and the bias of relative positions, and resize it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from timm.models import maxxvit
from torch import Tensor, nn

from manyheads.core.ops import attention
from manyheads.vision.models.linear import linear
from manyheads.vision.models.windows import attend_windows, dropout_of


def heads(qkv: Tensor, attn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take q, k, v `[..., heads, D]` out of a projection's channels, of which timm has two orders."""
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, attn.dim_head)).unbind(-2)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).unbind(-3)
    return q, k, v


def bias_of(attn: Any) -> Tensor | None:
    """The bias of relative positions, `[heads, n, n]`; of its three kinds one comes without a batch."""
    if attn.rel_pos is None:
        return None
    bias: Tensor = attn.rel_pos.get_bias()
    return bias if bias.dim() == 3 else bias[0]


def attend(
    attn: Any, x: Tensor, size: tuple[int, int], partition: Literal["window", "grid"], nchw: bool = False
) -> Tensor:
    """Project the image, attend in windows or grid, project back: `[B, H, W, C]`, or `[B, C, H, W]`."""
    qkv = linear(attn.qkv, x)
    q, k, v = heads(qkv.permute(0, 2, 3, 1) if nchw else qkv, attn)
    out = attend_windows(
        q, k, v, size, partition=partition, bias=bias_of(attn), scale=attn.scale,
        dropout_p=dropout_of(attn.attn_drop),
    ).flatten(3)  # fmt: skip
    return attn.proj_drop(linear(attn.proj, out.permute(0, 3, 1, 2) if nchw else out))


class PartitionAttention(nn.Module):
    """Attention in windows or in a grid, then an MLP; replaces timm's `PartitionAttentionCl` and `...2d`.

    Args:
        old: timm's block, whose layers it takes over.

    Shape:
        `[B, H, W, C]` to the same; `[B, C, H, W]` for `PartitionAttention2d`.

    Source:
        Tu et al. 2022 (MaxViT, arXiv 2204.01697).
    """

    def __init__(self, old: maxxvit.PartitionAttentionCl | maxxvit.PartitionAttention2d) -> None:
        super().__init__()
        self.partition_block: bool = old.partition_block
        self.partition_size: tuple[int, int] = old.partition_size
        self.nchw = isinstance(old, maxxvit.PartitionAttention2d)
        self.norm1, self.attn, self.ls1, self.drop_path1 = old.norm1, old.attn, old.ls1, old.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = old.norm2, old.mlp, old.ls2, old.drop_path2

    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        """Change the size of windows or grid, and resize the bias; timm's model calls this."""
        self.partition_size = to_2tuple(partition_size)
        if self.attn.rel_pos is not None:
            self.attn.rel_pos.set_window_size(self.partition_size)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the MLP."""
        partition: Literal["window", "grid"] = "window" if self.partition_block else "grid"
        found = attend(self.attn, self.norm1(x), self.partition_size, partition, self.nchw)
        x = x + self.drop_path1(self.ls1(found))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ParallelPartitionAttention(nn.Module):
    """Attention in windows and in a grid side by side, then an MLP; replaces timm's of the same name.

    Args:
        old: timm's block, whose layers it takes over.

    Shape:
        `[B, H, W, C]` to the same.
    """

    def __init__(self, old: maxxvit.ParallelPartitionAttention) -> None:
        super().__init__()
        self.partition_size: tuple[int, int] = old.partition_size
        self.norm1, self.attn_block, self.attn_grid = old.norm1, old.attn_block, old.attn_grid
        self.ls1, self.drop_path1 = old.ls1, old.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = old.norm2, old.mlp, old.ls2, old.drop_path2

    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        """Change the size of windows and grid, and resize the biases; timm's model calls this."""
        self.partition_size = to_2tuple(partition_size)
        for attn in (self.attn_block, self.attn_grid):
            if attn.rel_pos is not None:
                attn.rel_pos.set_window_size(self.partition_size)

    def forward(self, x: Tensor) -> Tensor:
        """Add both attentions' channels, one after the other, then the MLP."""
        y = self.norm1(x)
        window = attend(self.attn_block, y, self.partition_size, "window")
        grid = attend(self.attn_grid, y, self.partition_size, "grid")
        x = x + self.drop_path1(self.ls1(torch.cat((window, grid), dim=-1)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ImageAttention(nn.Module):
    """Attention over a whole image with a bias of relative positions; replaces timm's `Attention2d`.

    Args:
        old: timm's module, whose layers it takes over.

    Shape:
        `[B, C, H, W]` to the same.

    Source:
        Dai et al. 2021 (CoAtNet, arXiv 2106.04803).
    """

    def __init__(self, old: maxxvit.Attention2d) -> None:
        super().__init__()
        self.num_heads, self.dim_head, self.head_first = old.num_heads, old.dim_head, old.head_first
        self.scale = old.scale
        self.qkv, self.rel_pos, self.attn_drop = old.qkv, old.rel_pos, old.attn_drop
        self.proj, self.proj_drop = old.proj, old.proj_drop

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Attend with this layer's bias, or with one that layers share."""
        size = x.shape[2:]
        qkv = self.qkv(x).flatten(2).transpose(1, 2).contiguous()  # [B, N, 3 * C]
        bias = shared_rel_pos if self.rel_pos is None else bias_of(self)
        out = attention(*heads(qkv, self), bias=bias, scale=self.scale, dropout_p=dropout_of(self.attn_drop))
        out = out.flatten(2).transpose(1, 2).unflatten(2, size)
        return self.proj_drop(self.proj(out))
