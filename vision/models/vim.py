"""Vim, Vision Mamba: bidirectional state space scans over patches, the class token in the middle.

arXiv 2401.09417. Parameters have the names and shapes of the published weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.core.errors import DataError
from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.core.layers.norm import RMSNorm
from manyheads.vision.models.class_tokens import (
    ClassToken,
    Grid,
    PosResize,
    class_rows,
    join_rows,
    resize_pos_embed,
    split_rows,
)
from manyheads.vision.models.intermediates import Intermediates, Layout, arranged, packed, wanted
from manyheads.vision.models.pretrained_cfg import IMAGENET, evaluation
from manyheads.vision.models.vim_layers import (
    EPS,
    Block,
    Drops,
    PatchEmbed,
    check_options,
    check_pool,
    first_head,
    first_weights,
)

GlobalPool = Literal["token", "avg", "last", "max", ""]
Bimamba = Literal["v2", "v1", "none"]
Size = int | tuple[int, int] | None


class VisionMamba(nn.Module):
    """A stack of blocks over patches and class tokens, and a linear classifier; built by `vim`.

    Args:
        img_size: Height and width that the position embedding is made for; others resize it on the way.
        patch_size, stride: Of the patches, pixels.
        in_chans: Channels of the images.
        num_classes: Logits; 0 leaves the features.
        embed_dim: Width of a token.
        depth: Blocks.
        mixer: Makes a block's mixer.
        class_token: Where the class token stands: "middle" (published), "head", "tail", "double" (at both
            ends), "none".
        global_pool: What is classified: "token" (the mean of two), "avg" of the patches, the "last" token;
            "max": the largest of all tokens' logits; "": each token by itself.
        drops: Probabilities.
        pos_resize: How the position embedding follows another image size, as `resize_pos_embed`.

    Shape:
        x `[B, in_chans, H, W]`, any H and W of a patch or more; logits `[B, num_classes]`.

    Source:
        Zhu et al. 2024, arXiv 2401.09417.
    """

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        img_size: Grid,
        patch_size: int,
        stride: int,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        mixer: Callable[[], BidirectionalMamba | Mamba],
        class_token: ClassToken,
        global_pool: GlobalPool,
        drops: Drops,
        pos_resize: PosResize,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token, self.pos_resize, self.global_pool = class_token, pos_resize, global_pool
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(patch_size, stride, in_chans, embed_dim)
        self.grid_size = self.patch_embed.grid(*img_size)
        names = {"double": ("cls_token_head", "cls_token_tail"), "none": ()}.get(class_token, ("cls_token",))
        self.class_names = names
        self.num_prefix_tokens = len(names)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        patches = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + len(names), embed_dim))
        self.pos_drop = nn.Dropout(drops.positions)
        self.layers = nn.ModuleList(
            Block(embed_dim, mixer(), drops.path * i / max(1, depth - 1)) for i in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, eps=EPS)
        self.head_drop = nn.Dropout(drops.head)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": stride} for i in range(depth)
        ]
        tokens = [self.get_parameter(name) for name in ("pos_embed", *names)]
        first_weights(self.patch_embed, tokens, self.layers)
        first_head(self.head)

    def _tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Patches and class tokens with their positions, and the grid of the patches."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise DataError(f"images must be [B, {self.in_chans}, H, W], not {list(x.shape)}")
        grid = self.patch_embed.grid(x.shape[2], x.shape[3])
        tokens = self.patch_embed(x)
        if self.class_names:
            found = torch.cat([self.get_parameter(name) for name in self.class_names], 1)
            rows = class_rows(self.class_token, tokens.shape[1])
            tokens = join_rows(tokens, found.to(tokens.dtype).expand(x.shape[0], -1, -1), rows)
        positions: Tensor = self.pos_embed
        if grid != self.grid_size:
            positions = resize_pos_embed(positions, self.grid_size, grid, self.class_token, self.pos_resize)
        return self.pos_drop(tokens + positions), grid

    def _run(self, block: nn.Module, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, hidden, stream, use_reentrant=False)
        return block(hidden, stream)

    def _normed(self, hidden: Tensor, stream: Tensor) -> Tensor:
        if isinstance(self.norm_f, nn.Identity):  # pruned
            return hidden + stream
        return self.norm_f(hidden, residual=stream)[0]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm, `[B, M + class tokens, embed_dim]`."""
        hidden, stream = self._tokens(x)[0], None
        for block in self.layers:
            hidden, stream = self._run(block, hidden, stream)
        assert stream is not None
        return self._normed(hidden, stream).to(self.pos_embed.dtype)

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "last":
            return x[:, -1]
        if self.global_pool in ("", "max"):
            return x
        rows = class_rows(self.class_token, x.shape[1] - self.num_prefix_tokens)
        if self.global_pool == "token" and len(rows) == 1:
            return x[:, rows[0]]
        patches, extra = split_rows(x, rows)
        return (extra if self.global_pool == "token" else patches).mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned; with `pre_logits` only pool."""
        x = self.head_drop(self._pool(x))
        if pre_logits:
            return x
        x = self.head(x)
        return x.amax(1) if self.global_pool == "max" else x

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Layout = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates:
        """Return the streams after some blocks as maps, without the class tokens; arguments as timm's.

        Args:
            indices: The last n blocks if a number, all if None, else which.
            return_prefix_tokens: Return the class tokens of each map, too.
            norm: Apply the last norm to each map.
            stop_early: Leave out the blocks after the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Leave out the last features.
            output_dict: Return a dict by timm's names.
        """
        take, last = wanted(len(self.layers), indices)
        hidden, grid = self._tokens(x)
        rows = class_rows(self.class_token, grid[0] * grid[1])
        stream, found = None, []
        for i, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            hidden, stream = self._run(block, hidden, stream)
            if i in take:
                found.append(split_rows(self._normed(hidden, stream) if norm else hidden + stream, rows))
        maps = arranged([patches for patches, _ in found], grid, output_fmt)
        prefix = [extra for _, extra in found] if return_prefix_tokens and rows else None
        return packed(
            lambda: self._normed(hidden, stream).to(self.pos_embed.dtype),  # type: ignore[arg-type]
            maps, prefix, only=intermediates_only, as_dict=output_dict,
        )  # fmt: skip

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after those wanted, and the norm and the classifier where asked."""
        take, last = wanted(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return list(take)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Make a new classifier; 0 classes leave the features.

        Raises:
            UsageError: No such pooling in this model.
        """
        if global_pool is not None:
            check_pool(global_pool, self.class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        first_head(self.head)

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize the position embedding for good: what each forward pass would do for this image size."""
        grid = self.patch_embed.grid(*to_2tuple(img_size))
        resized = resize_pos_embed(
            self.pos_embed.detach(), self.grid_size, grid, self.class_token, self.pos_resize
        )
        self.pos_embed, self.grid_size = nn.Parameter(resized.clone()), grid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates that fall towards the first."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters to keep from weight decay: positions, class tokens, the scans' decays and skips."""
        scans = ("A_log", "A_b_log", "D", "D_b")
        inside = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in scans}
        return {"pos_embed", *self.class_names} | inside


def vim(
    embed_dim: int = 192,
    depth: int = 24,
    d_state: int = 16,
    patch_size: int = 16,
    stride: int = 16,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    class_token: ClassToken = "middle",
    bimamba: Bimamba = "v2",
    divide_out: bool = True,
    init_layer_scale: float | None = None,
    global_pool: GlobalPool | None = None,
    drop_rate: float = 0.0,
    pos_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Build a Vim; the defaults are Vim-tiny at 224.

    Args:
        embed_dim, depth, d_state: Width of a token, blocks, states a channel of the scans.
        patch_size, stride: Of the patches, pixels.
        num_classes: Logits; 0 leaves the features.
        in_chans, img_size: Channels, and height and width (one number for both) of the images; None is 224.
        class_token, global_pool, pos_resize: As `VisionMamba`; a pooling of None means the class token, or
            the mean where there is none.
        bimamba: "v2", each direction with weights of its own; "v1", with decays of its own; "none", forwards.
        divide_out: Halve the sum of the directions ("v2" alone).
        init_layer_scale: First value of a factor for each channel of a mixer's output; None for no factor.
        drop_rate, pos_drop_rate: Probabilities: before the classifier, and after the positions.
        drop_path_rate: Probability that the last block's branch is left out; it rises from 0 in the first.

    Raises:
        UsageError: A size is not positive, or an option unknown or without effect.
        DataError: img_size holds no patch.

    Source:
        arXiv 2401.09417.

    Example:
        >>> vim(embed_dim=192, depth=12, img_size=32, patch_size=4, stride=4, num_classes=10)
    """
    check_options(locals())
    pool: GlobalPool = global_pool if global_pool is not None else "avg" if class_token == "none" else "token"
    check_pool(pool, class_token)
    size = to_2tuple(224 if img_size is None else img_size)
    model = VisionMamba(
        (size[0], size[1]), patch_size, stride, in_chans, num_classes, embed_dim, depth,
        partial(Mamba, embed_dim, d_state=d_state) if bimamba == "none"
        else partial(
            BidirectionalMamba, embed_dim, d_state=d_state, kind=bimamba, divide=divide_out,
            layer_scale=init_layer_scale,
        ),
        class_token, pool, Drops(drop_rate, pos_drop_rate, drop_path_rate), pos_resize,
    )  # fmt: skip
    cfg = evaluation((in_chans, *size), IMAGENET, 0.875, num_classes, "patch_embed.proj", "head")
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def vim_tiny_patch16_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "token",
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Vim-tiny: 7,148,008 parameters; 76.1 % top-1 on ImageNet as published."""
    return vim(192, **locals())


def vim_tiny_patch16_stride8_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "token",
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Vim-tiny on patches that overlap by half: 7,250,344 parameters; 78.3 % as published."""
    return vim(192, stride=8, **locals())


def vim_small_patch16_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "token",
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Vim-small: 25,796,584 parameters; 80.5 % as published."""
    return vim(384, **locals())


def vim_small_patch16_stride8_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "token",
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Vim-small on patches that overlap by half; 81.6 % as published."""
    return vim(384, stride=8, **locals())


def vim_base_patch16_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "token",
    pos_resize: PosResize = "middle",
) -> VisionMamba:
    """Vim-base: 97,598,440 parameters; 81.9 % as published."""
    return vim(768, **locals())
