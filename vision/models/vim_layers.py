"""What Vim is made of: overlapping patches, the block of stream, norm and mixer, and its first weights.

arXiv 2401.09417.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.core.layers.norm import RMSNorm
from manyheads.core.ops.precision import wide
from manyheads.vision.models.class_tokens import ClassToken, Grid

EPS = 1e-5


class Drops(NamedTuple):
    """Probabilities: before the classifier, after the positions, and of whole branches in the last block."""

    head: float = 0.0
    positions: float = 0.0
    path: float = 0.0


class PatchEmbed(nn.Module):
    """Patches of an image, each one token; with a stride below their size they overlap.

    Shape:
        x `[B, C, H, W]` -> `[B, M, dim]`.
    """

    def __init__(self, patch_size: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size, self.stride, self.in_chans = patch_size, stride, in_chans
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)

    def grid(self, height: int, width: int) -> Grid:
        """Patches from top to bottom and from left to right; what no whole patch fits is left out.

        Raises:
            DataError: The image holds no patch.
        """
        if min(height, width) < self.patch_size:
            raise DataError(f"an image of {height} x {width} holds no patch of {self.patch_size}")
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """Cut and project."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Add, normalise, mix: the stream is float32 and is added to inside the norm.

    Shape:
        hidden, stream `[B, L, dim]`: what the block before gave, and what it was added to; both again.
    """

    def __init__(self, dim: int, mixer: BidirectionalMamba | Mamba, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(dim, eps=EPS)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the stream that it belongs to."""
        if stream is None:
            normed, stream = self.norm(hidden), wide(hidden)
        else:
            normed, stream = self.norm(hidden, residual=stream)
        # Upstream drops a branch as it enters the next block: the same rates, on the same branches.
        return self.drop_path(self.mixer(normed.to(self.mixer.in_proj.weight.dtype))), stream


def first_weights(patch_embed: PatchEmbed, tokens: list[nn.Parameter], blocks: nn.ModuleList) -> None:
    """Draw a model's first weights as the official code does; `first_head` those of the classifier.

    Args:
        tokens: The position embedding and the class tokens.
    """
    lecun_normal_(patch_embed.proj.weight)
    if patch_embed.proj.bias is not None:
        nn.init.zeros_(patch_embed.proj.bias)
    for parameter in tokens:
        trunc_normal_(parameter, std=0.02)
    for block in blocks:
        assert isinstance(block, Block)
        nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            block.mixer.out_proj.weight.div_(math.sqrt(len(blocks)))
        if isinstance(block.mixer, BidirectionalMamba) and block.mixer.kind == "v2":
            nn.init.zeros_(block.mixer.dt_proj_b.bias)


def first_head(head: nn.Module) -> None:
    """Draw the classifier's first weights."""
    if isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def check_pool(global_pool: str, class_token: ClassToken) -> None:
    """Refuse a pooling that is unknown, or that needs a class token where there is none."""
    known = ("token", "avg", "last", "max", "")
    if global_pool not in known:
        raise UsageError(f"vim: no global_pool {global_pool!r}{did_you_mean(global_pool, known)}")
    if global_pool == "token" and class_token == "none":
        raise UsageError("vim: global_pool='token' needs a class token; take 'avg', 'last' or 'max'")


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse a builder's arguments that are not positive, unknown, or without effect."""
    for name in ("embed_dim", "depth", "d_state", "patch_size", "stride", "in_chans"):
        if given[name] < 1:
            raise UsageError(f"vim: {name} must be positive, not {given[name]}")
    if given["num_classes"] < 0:
        raise UsageError(f"vim: num_classes must not be negative, and is {given['num_classes']}")
    choices = {
        "class_token": ("middle", "head", "tail", "double", "none"),
        "bimamba": ("v2", "v1", "none"),
        "pos_resize": ("middle", "legacy"),
    }
    for name, known in choices.items():
        if given[name] not in known:
            raise UsageError(f"vim: {name} must be one of {', '.join(known)}, not {given[name]!r}")
    for name in ("drop_rate", "pos_drop_rate", "drop_path_rate"):
        if not 0 <= given[name] < 1:
            raise UsageError(f"vim: {name} must be in [0, 1), not {given[name]}")
    if given["bimamba"] == "none" and given["init_layer_scale"] is not None:
        raise UsageError("vim: init_layer_scale needs bimamba v1 or v2")
