"""Swin, Swin V2 and timm's CR variant of it: windowed transformers; timm's, on our window attention.

Every architecture of timm's modules `swin_transformer`, `swin_transformer_v2` and `swin_transformer_v2_cr`,
with timm's parameters and names.
"""

from __future__ import annotations

from torch import nn

from manyheads.vision.models.timm_build import build

MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


def swin(
    variant: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | list[int] | None = None,
    patch_size: int | None = None,
    window_size: int | None = None,
    embed_dim: int | None = None,
    depths: list[int] | None = None,
    num_heads: list[int] | None = None,
    mlp_ratio: float | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    always_partition: bool | None = None,
    strict_img_size: bool | None = None,
) -> nn.Module:
    """Build a Swin of timm's with our attention; None leaves the variant's own number.

    Args:
        variant: timm's name of the architecture.
        num_classes: Outputs; 0 gives the pooled features.
        in_chans: Channels of the image.
        img_size: Of the image, in pixels; a list is height and width.
        patch_size: Pixels along a side of a patch.
        window_size: Tokens along a side of a window; smaller where the image is.
        embed_dim: Width of a token in the first stage; it doubles with each.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Width of the MLPs in widths of a token.
        global_pool: "avg", "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance that the last block is left out; it grows from 0 with the depth.
        proj_drop_rate: Dropout behind projections.
        attn_drop_rate: Dropout of attention weights; in training only, then without the fused op.
        always_partition: Keep windows and shifts where a window is as large as the image.
        strict_img_size: False takes images of other sizes than `img_size`.

    Raises:
        UsageError: No such variant, or an argument that it does not take or that does not fit.

    Source:
        Liu et al. 2021 (arXiv 2103.14030), 2022 (arXiv 2111.09883).

    Example:
        >>> swin("swin_tiny_patch4_window7_224", num_classes=10, img_size=64, window_size=4)  # doctest: +SKIP
    """
    given = dict(locals())
    del given["variant"]
    return build("swin", variant, MODULES, given)
