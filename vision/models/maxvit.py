"""MaxViT, CoAtNet and their kin: convolutions with attention in windows, grids or over the image; timm's.

Every architecture of timm's module `maxxvit`, with timm's parameters and names, on our attention.
"""

from __future__ import annotations

from timm.layers import to_2tuple
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.vision.models.maxvit_blocks import ParallelPartitionAttention, PartitionAttention
from manyheads.vision.models.timm_build import build

MODULES = ("maxxvit",)
# timm keeps these in configs of their own, and takes them by these names.
RENAMED = {
    "window_size": "transformer_window_size",
    "grid_size": "transformer_grid_size",
    "dim_head": "transformer_dim_head",
    "attn_drop_rate": "transformer_attn_drop",
    "proj_drop_rate": "transformer_proj_drop",
}


def maxvit(
    variant: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | list[int] | None = None,
    window_size: int | None = None,
    grid_size: int | None = None,
    stem_width: int | None = None,
    embed_dim: list[int] | None = None,
    depths: list[int] | None = None,
    dim_head: int | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
) -> nn.Module:
    """Build a MaxViT or CoAtNet of timm's with our attention; None leaves the variant's own number.

    Args:
        variant: timm's name of the architecture.
        num_classes: Outputs; 0 gives the pooled features.
        in_chans: Channels of the image.
        img_size: Of the image, in pixels; a list is height and width. Windows divide all feature maps.
        window_size: Tokens along a side of a window; by default a 32nd of the image's.
        grid_size: Tokens along a side of a grid; by default that of a window.
        stem_width: Channels of the stem.
        embed_dim: Channels of each stage.
        depths: Blocks of each stage.
        dim_head: Channels of a head.
        global_pool: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance that the last block is left out; it grows from 0 with the depth.
        proj_drop_rate: Dropout behind projections.
        attn_drop_rate: Dropout of attention weights; in training only, then without the fused op.

    Raises:
        UsageError: No such variant, or an argument that it does not take or that does not fit.

    Source:
        Tu et al. 2022 (MaxViT, arXiv 2204.01697); Dai et al. 2021 (CoAtNet, arXiv 2106.04803).

    Example:
        >>> maxvit("maxvit_tiny_tf_224", num_classes=10, img_size=64, depths=[1, 1, 1, 1])  # doctest: +SKIP
    """
    given = dict(locals())
    del given["variant"]
    for name in ("proj_drop_rate", "attn_drop_rate"):
        given[name] = given[name] or None
    model = build("maxvit", variant, MODULES, given, RENAMED)
    _check(variant, model)
    return model


def _check(variant: str, model: nn.Module) -> None:
    """Refuse windows and grids that do not divide the feature maps of the model's image size."""
    stride = to_2tuple(model.stem.stride)
    size = [pixels // by for pixels, by in zip(model.img_size, stride, strict=True)]  # type: ignore[arg-type]
    for stage in model.stages:  # type: ignore[union-attr]
        size = [(length - 1) // 2 + 1 for length in size]
        for block in stage.modules():
            if not isinstance(block, PartitionAttention | ParallelPartitionAttention):
                continue
            if any(length % part for length, part in zip(size, block.partition_size, strict=True)):
                raise UsageError(
                    f"{variant}: windows and grids of {list(block.partition_size)} tokens do not divide a"
                    f" feature map of {size}: choose another img_size, window_size or grid_size"
                )
