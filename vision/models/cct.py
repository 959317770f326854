"""CCT, the compact convolutional transformer, for small data.

arXiv 2104.05704. Parameters have the names and shapes of the official weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.core.errors import DataError
from manyheads.core.ops.dropout import dropout
from manyheads.vision.models.cct_layers import (
    Positions,
    SequenceClassifier,
    Tokenizer,
    check_options,
    check_pool,
    first_linear,
    sinusoids,
)
from manyheads.vision.models.class_tokens import Grid, resize_grid, square_grid
from manyheads.vision.models.intermediates import Intermediates, Layout, arranged, packed, wanted
from manyheads.vision.models.pretrained_cfg import CIFAR10, IMAGENET, evaluation

GlobalPool = Literal["seq", ""]
Size = int | tuple[int, int] | None


class CCT(nn.Module):
    """Convolutions, a transformer over their map's pixels, and a classifier; built by `cct`.

    Args:
        img_size: Height and width that the positions are made for; others resize them on the way.
        tokenizer: The convolutions.
        classifier: The rest.
        in_chans, num_classes, embed_dim: Channels of the images, logits, width of a token.
        positions: Which the classifier has.
        global_pool: "seq", by attention, or "" for each token's logits.

    Shape:
        x `[B, in_chans, H, W]`; logits `[B, num_classes]`.

    Source:
        Hassani et al. 2021, arXiv 2104.05704.
    """

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        img_size: Grid,
        tokenizer: Tokenizer,
        classifier: SequenceClassifier,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        positions: Positions,
        global_pool: GlobalPool,
    ) -> None:
        super().__init__()
        self.tokenizer, self.classifier = tokenizer, classifier
        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.positions, self.global_pool, self.grad_checkpointing = positions, global_pool, False
        self.grid_size = tokenizer.grid(*img_size)
        self.feature_info = [
            {"module": f"classifier.blocks.{i}", "num_chs": embed_dim, "reduction": tokenizer.reduction}
            for i in range(len(classifier.blocks))
        ]

    def _tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens with their positions, and their grid."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise DataError(f"images must be [B, {self.in_chans}, H, W], not {list(x.shape)}")
        grid = self.tokenizer.grid(x.shape[2], x.shape[3])
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2)
        positions: Tensor | None = self.classifier.positional_emb
        if positions is not None and grid != self.grid_size:
            positions = self._positions_at(positions, grid)
        tokens = tokens if positions is None else tokens + positions
        return dropout(tokens, self.classifier.drop, self.training), grid

    def _positions_at(self, positions: Tensor, grid: Grid) -> Tensor:
        """The positions of another grid."""
        if self.positions == "sine":
            return sinusoids(grid[0] * grid[1], self.embed_dim).to(positions)
        return resize_grid(positions, self.grid_size, grid, "bilinear")

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm, `[B, N, embed_dim]`."""
        x = self._tokens(x)[0]
        for block in self.classifier.blocks:
            x = self._run(block, x)
        return self.classifier.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned; with `pre_logits` only pool."""
        x = self.classifier.pool(x) if self.global_pool else x
        return x if pre_logits else self.classifier.fc(x)

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
        """Return the outputs of some blocks as maps; arguments as timm's, and there are no prefix tokens.

        Args:
            indices: The last n blocks if a number, all if None, else which.
            return_prefix_tokens: Without effect: there are none.
            norm: Apply the last norm to each map.
            stop_early: Leave out the blocks after the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Leave out the last features.
            output_dict: Return a dict by timm's names.
        """
        blocks = self.classifier.blocks
        take, last = wanted(len(blocks), indices)
        x, grid = self._tokens(x)
        found = []
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x = self._run(block, x)
            if i in take:
                found.append(self.classifier.norm(x) if norm else x)
        maps = arranged(found, grid, output_fmt)
        return packed(
            lambda: self.classifier.norm(x), maps, None, only=intermediates_only, as_dict=output_dict
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after those wanted, and the norm and the classifier where asked."""
        take, last = wanted(len(self.classifier.blocks), indices)
        self.classifier.blocks = self.classifier.blocks[: last + 1]
        if prune_norm:
            self.classifier.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
            self.classifier.attention_pool = nn.Identity()  # type: ignore[assignment]
        return list(take)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.classifier.fc

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Make a new classifier; 0 classes leave the features."""
        if global_pool is not None:
            check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.classifier.fc = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            fc = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            first_linear(fc)
            self.classifier.fc = fc

    def set_input_size(self, img_size: int | Grid) -> None:
        """Resize the positions for good: what each forward pass would do for this image size."""
        height, width = to_2tuple(img_size)
        grid, old = self.tokenizer.grid(height, width), self.classifier.positional_emb
        if old is not None and grid != self.grid_size:
            new = self._positions_at(old.detach(), grid).clone()
            self.classifier.positional_emb = nn.Parameter(new, requires_grad=old.requires_grad)
        self.grid_size = grid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates that fall towards the first."""
        blocks = r"^classifier\.blocks\.(\d+)"
        last = (r"^classifier\.(?:norm|attention_pool)", (99999,))
        return {
            "stem": r"^tokenizer|^classifier\.positional_emb",
            "blocks": blocks if coarse else [(blocks, None), last],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters to keep from weight decay: the positions."""
        return {"classifier.positional_emb"}


def cct(
    embed_dim: int = 256,
    depth: int = 7,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    conv_layers: int = 1,
    kernel_size: int = 3,
    stride: int | None = None,
    padding: int | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    global_pool: GlobalPool = "seq",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> CCT:
    """Build a CCT; the defaults are CCT-7/3x1 for CIFAR-10.

    Args:
        embed_dim, depth, num_heads, mlp_ratio: Width of a token, layers, heads, and the feed-forward blocks'
            width as a multiple of embed_dim.
        conv_layers, kernel_size: Convolutions, and their width.
        stride, padding: Of each convolution; None means `max(1, kernel_size // 2 - 1)` and half the width.
        num_classes: Logits; 0 leaves the features.
        in_chans, img_size: Channels, and height and width (one number for both) of the images; None is 32.
        positions: "learnable", "sine" (a fixed table) or "none".
        global_pool: "seq", by attention, or "" for each token's logits.
        drop_rate, attn_drop_rate: Probabilities: of elements, and of attention weights (0.1 in the paper).
        drop_path_rate: Probability that the last layer's branches are left out (0.1 in the paper); it rises
            from 0 in the first.

    Raises:
        UsageError: A size is not positive, an option unknown, or the heads do not divide the width.
        DataError: img_size is too small for the convolutions.

    Example:
        >>> model = cct(128, 2, 2, mlp_ratio=1, conv_layers=2, img_size=28, in_chans=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    check_options(locals())
    stride = max(1, kernel_size // 2 - 1) if stride is None else stride
    padding = max(1, kernel_size // 2) if padding is None else padding
    size = to_2tuple(32 if img_size is None else img_size)
    tokenizer = Tokenizer(in_chans, embed_dim, conv_layers, kernel_size, stride, padding)
    height, width = tokenizer.grid(*size)
    classifier = SequenceClassifier(
        height * width, embed_dim, num_heads, mlp_ratio, depth, num_classes, positions,
        drop_rate, attn_drop_rate, drop_path_rate,
    )  # fmt: skip
    sizes = (in_chans, num_classes, embed_dim)
    model = CCT((size[0], size[1]), tokenizer, classifier, *sizes, positions, global_pool)
    settings = (CIFAR10, 1.0) if max(size) <= 64 else (IMAGENET, 0.9)
    names = ("tokenizer.conv_layers.0.0", "classifier.fc")
    cfg = evaluation((in_chans, size[0], size[1]), *settings, num_classes, *names)
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def cct_2_3x2_32(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-2/3x2."""
    return cct(128, 2, 2, 1, 2, 3, **locals())


def cct_4_3x2_32(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-4/3x2."""
    return cct(128, 4, 2, 1, 2, 3, **locals())


def cct_6_3x1_32(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-6/3x1."""
    return cct(256, 6, 4, 2, 1, 3, **locals())


def cct_7_3x1_32(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-7/3x1."""
    return cct(256, 7, 4, 2, 1, 3, **locals())


def cct_7_3x2_32(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Size = 32,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-7/3x2."""
    return cct(256, 7, 4, 2, 2, 3, **locals())


def cct_14_7x2_224(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 224,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-14/7x2."""
    return cct(384, 14, 6, 3, 2, 7, **locals())


def cct_14_7x2_384(
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Size = 384,
    positions: Positions = "learnable",
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: GlobalPool = "seq",
) -> CCT:
    """CCT-14/7x2."""
    return cct(384, 14, 6, 3, 2, 7, **locals())


def filter_cct(state: Mapping[str, Any], model: CCT) -> dict[str, Tensor]:
    """What timm calls on a checkpoint before it loads it: fit the positions to the model's image size."""
    fitted = dict(state.get("model", state))
    key, wanted = "classifier.positional_emb", model.classifier.positional_emb
    if key in fitted and wanted is not None and fitted[key].shape != wanted.shape:
        if model.positions == "sine":
            fitted[key] = wanted.detach()
        else:
            old = square_grid(fitted[key].shape[1], "none")
            fitted[key] = resize_grid(fitted[key], old, model.grid_size, "bilinear")
    return fitted
