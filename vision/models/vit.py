"""Vision transformers: ViT, DeiT, hybrids with convolutions, relative positions; timm's, on our attention.

Every architecture of timm's modules `vision_transformer`, `deit`, `vision_transformer_hybrid` and
`vision_transformer_relpos`, with timm's parameters and names.
"""

from __future__ import annotations

from torch import nn

from manyheads.vision.models.timm_build import build

MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vision_transformer_relpos")


def vit(
    variant: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | list[int] | None = None,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    pos_drop_rate: float | None = None,
    patch_drop_rate: float | None = None,
    dynamic_img_size: bool | None = None,
) -> nn.Module:
    """Build a vision transformer of timm's with our attention; None leaves the variant's own number.

    Args:
        variant: timm's name of the architecture.
        num_classes: Outputs; 0 gives the pooled features.
        in_chans: Channels of the image.
        img_size: Of the image, in pixels; a list is height and width.
        patch_size: Pixels along a side of a patch.
        embed_dim: Width of a token.
        depth: Blocks.
        num_heads: Heads; divides embed_dim.
        mlp_ratio: Width of the MLPs in widths of a token.
        global_pool: "token", "avg", "map" (attention), "max", "avgmax", or "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Chance that the last block is left out; it grows from 0 with the depth.
        proj_drop_rate: Dropout behind projections.
        attn_drop_rate: Dropout of attention weights.
        pos_drop_rate: Dropout behind the positions; not for relative positions.
        patch_drop_rate: Share of tokens that training leaves out; not for relative positions.
        dynamic_img_size: Take images of any size, by resizing the positions; not for relative positions.

    Raises:
        UsageError: No such variant, or an argument that it does not take or that does not fit.

    Source:
        Dosovitskiy et al. 2021 (arXiv 2010.11929); Touvron et al. 2021 (DeiT, arXiv 2012.12877).

    Example:
        >>> vit("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, depth=6)  # doctest: +SKIP
    """
    given = dict(locals())
    del given["variant"]
    return build("vit", variant, MODULES, given)
