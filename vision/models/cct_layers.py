"""What CCT is made of: the convolutional tokenizer, and an encoder layer with its own order of norms.

arXiv 2104.05704.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.layers.attention import MultiHeadAttention
from manyheads.core.ops.dropout import dropout
from manyheads.vision.models.class_tokens import Grid

Positions = Literal["learnable", "sine", "none"]
PLANES = 64  # channels between two convolutions
POOL, POOL_STRIDE, POOL_PADDING = 3, 2, 1


class Tokenizer(nn.Module):
    """Convolutions, each with ReLU and maximum pooling, whose last map's pixels are the tokens.

    Args:
        in_chans, dim: Channels of the images, and of a token.
        layers: Convolutions.
        kernel_size, stride, padding: Of each convolution.

    Shape:
        x `[B, in_chans, H, W]` -> `[B, dim, h, w]`.
    """

    def __init__(
        self, in_chans: int, dim: int, layers: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        widths = [in_chans, *[PLANES] * (layers - 1), dim]
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], kernel_size, stride, padding, bias=False),
                    nn.ReLU(),
                    nn.MaxPool2d(POOL, POOL_STRIDE, POOL_PADDING),
                )
                for i in range(layers)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @property
    def reduction(self) -> int:
        """Pixels from one token to the next."""
        return (self.stride * POOL_STRIDE) ** len(self.conv_layers)

    def grid(self, height: int, width: int) -> Grid:
        """Tokens from top to bottom and from left to right.

        Raises:
            DataError: The image is too small for the convolutions.
        """
        found = []
        for start in (height, width):
            size = start
            for _ in self.conv_layers:
                size = (size + 2 * self.padding - self.kernel_size) // self.stride + 1
                size = (size + 2 * POOL_PADDING - POOL) // POOL_STRIDE + 1
            found.append(size)
        if min(found) < 1:
            raise DataError(f"an image of {height} x {width} is too small for these convolutions")
        return found[0], found[1]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and pool; maps lie with channels last, as pooling and the tokens are read fastest."""
        for layer in self.conv_layers:
            conv, activation, pool = layer.children()
            x = pool(activation(conv(x).contiguous(memory_format=torch.channels_last)))
        return x


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block; the residual of the second starts from the normed tokens.

    Args:
        dim, num_heads, hidden: Width of a token, heads, width inside the feed-forward block.
        drop, attn_drop, drop_path: Probabilities: of elements, of attention weights, of a whole branch.

    Shape:
        x `[B, N, dim]`; the result likewise.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, drop: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = MultiHeadAttention(dim, num_heads, qkv_bias=False, dropout=attn_drop)
        self.linear1 = nn.Linear(dim, hidden)
        self.norm1 = nn.LayerNorm(dim)
        self.linear2 = nn.Linear(hidden, dim)
        self.drop = drop
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens, then each token's features."""
        attended = dropout(self.self_attn(self.pre_norm(x)), self.drop, self.training)
        x = self.norm1(x + self.drop_path(attended))
        hidden = dropout(F.gelu(self.linear1(x)), self.drop, self.training)
        return x + self.drop_path(dropout(self.linear2(hidden), self.drop, self.training))


class SequenceClassifier(nn.Module):
    """The transformer over the tokens, the pooling by attention, and the classifier.

    Args:
        length: Tokens that the positions are made for.
        dim, num_heads, mlp_ratio, depth: Of the encoder layers.
        num_classes: Logits; 0 leaves the features.
        positions: "learnable", "sine" or "none".
        drop, attn_drop, drop_path: As `EncoderLayer`; the last rises from 0 in the first layer.
    """

    positional_emb: nn.Parameter | None

    def __init__(
        self,
        length: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        depth: int,
        num_classes: int,
        positions: Positions,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.drop = drop
        self.attention_pool = nn.Linear(dim, 1)
        if positions == "learnable":
            self.positional_emb = nn.Parameter(torch.zeros(1, length, dim))
            trunc_normal_(self.positional_emb, std=0.2)
        elif positions == "sine":
            self.positional_emb = nn.Parameter(sinusoids(length, dim), requires_grad=False)
        else:
            self.positional_emb = None
        self.blocks = nn.ModuleList(
            EncoderLayer(
                dim, num_heads, int(dim * mlp_ratio), drop, attn_drop, drop_path * i / max(1, depth - 1)
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                first_linear(module)

    def pool(self, x: Tensor) -> Tensor:
        """The tokens' mean, weighted by a softmax over scores of their own: `[B, N, dim]` -> `[B, dim]`."""
        weights = F.softmax(self.attention_pool(x), 1)  # [B, N, 1]
        return (weights.transpose(1, 2) @ x)[:, 0]


def sinusoids(length: int, dim: int) -> Tensor:
    """The table of positions `[1, length, dim]`: sines in the even features, cosines in the odd ones."""
    feature = torch.arange(dim, dtype=torch.float64)
    rates = 10000 ** (2 * (feature // 2) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] / rates
    return torch.where(feature % 2 == 0, angles.sin(), angles.cos()).float()[None]


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse a builder's arguments that are not positive, unknown, or do not divide."""
    for name in ("embed_dim", "depth", "num_heads", "conv_layers", "kernel_size", "in_chans"):
        if given[name] < 1:
            raise UsageError(f"cct: {name} must be positive, not {given[name]}")
    if given["mlp_ratio"] <= 0:
        raise UsageError(f"cct: mlp_ratio must be positive, not {given['mlp_ratio']}")
    if given["num_classes"] < 0:
        raise UsageError(f"cct: num_classes must not be negative, and is {given['num_classes']}")
    if given["embed_dim"] % given["num_heads"]:
        raise UsageError(f"cct: {given['num_heads']} heads do not divide embed_dim {given['embed_dim']}")
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0 <= given[name] < 1:
            raise UsageError(f"cct: {name} must be in [0, 1), not {given[name]}")
    if given["positions"] not in ("learnable", "sine", "none"):
        raise UsageError(f"cct: positions must be learnable, sine or none, not {given['positions']!r}")
    check_pool(given["global_pool"])


def check_pool(global_pool: str) -> None:
    """Refuse an unknown pooling."""
    if global_pool not in ("seq", ""):
        raise UsageError(f"cct: global_pool must be 'seq' or '', not {global_pool!r}")


def first_linear(layer: nn.Linear) -> None:
    """Draw a linear layer's first weights as the official code does."""
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
