"""The layers of Informer, with the parameter names of its authors' code.

Source: arXiv 2012.07436.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import ACTIVATIONS, AttentionLayer, Probe, feed_forward
from manyheads.timeseries.models.blocks import Pointwise
from manyheads.timeseries.models.embeddings import CircularConv


class DistilLayer(nn.Module):
    """Halve a series: convolution, batch norm, ELU and the maximum of each three steps, every second.

    Args:
        d_model: Width of a token.
        padding: Steps of the other end put before and after the series; 2 makes one token more.

    Shape:
        `[B, L, d_model]` -> `[B, ceil(L / 2) + padding - 1, d_model]`.
    """

    def __init__(self, d_model: int, padding: int = 1) -> None:
        super().__init__()
        self.downConv = CircularConv(d_model, d_model, padding=padding)
        self.norm = nn.BatchNorm1d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the series."""
        x = self.downConv(x)
        x = F.elu(self.norm(x.flatten(0, 1)).view_as(x))  # a channel's norm is over batch and time
        return F.max_pool1d(x.mT, kernel_size=3, stride=2, padding=1).mT


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block, each followed by residual and norm.

    Args:
        attention: Mixes the steps.
        d_model: Width of a token.
        d_ff: Width of the feed-forward block.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(
        self, attention: AttentionLayer, d_model: int, d_ff: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.attention = attention
        self.conv1 = Pointwise(d_model, d_ff)
        self.conv2 = Pointwise(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout, self.activation = dropout, ACTIVATIONS[activation]

    def forward(self, x: Tensor, probe: Probe | None = None) -> Tensor:
        """Mix the steps, then each step's features."""
        p = self.dropout if self.training else 0.0
        x = self.norm1(x + dropout(self.attention(x, x, probe=probe), p))
        return self.norm2(x + feed_forward(x, self.conv1, self.conv2, self.activation, p))


class Encoder(nn.Module):
    """Layers, each but the last followed by a halving if there is any, and a final norm.

    Args:
        layers: The attention layers.
        halvings: One less, or none.
        d_model: Width of a token.

    Shape:
        `[B, L, d_model]` -> `[B, L', d_model]`.
    """

    def __init__(self, layers: Sequence[EncoderLayer], halvings: Sequence[DistilLayer], d_model: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.conv_layers = nn.ModuleList(halvings)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, probe: Probe | None = None) -> Tensor:
        """Encode tokens."""
        for layer, halve in zip_longest(self.attn_layers, self.conv_layers):
            x = layer(x, probe)
            x = x if halve is None else halve(x)
        return self.norm(x)


class EncoderStack(nn.Module):
    """Encoders that read the last L, L / 2, L / 4, ... tokens; what they give stands one after the other.

    Shape:
        `[B, L, d_model]` -> `[B, L', d_model]`.
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, x: Tensor, probe: Probe | None = None) -> Tensor:
        """Encode tokens."""
        lengths = [x.shape[1] // 2**i for i in range(len(self.encoders))]
        parts = zip(self.encoders, lengths, strict=True)
        return torch.cat([encoder(x[:, -length:], probe) for encoder, length in parts], dim=1)


class DecoderLayer(nn.Module):
    """Causal attention, attention to the encoder's tokens and a feed-forward block, with residuals and norms.

    Args:
        self_attention: Mixes the decoder's tokens.
        cross_attention: Takes from the encoder's.
        d_model: Width of a token.
        d_ff: Width of the feed-forward block.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".
        apart: Whether no query of `cross_attention` depends on another.

    Shape:
        x `[B, L, d_model]`, encoded `[B, E, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(
        self,
        self_attention: AttentionLayer,
        cross_attention: AttentionLayer,
        d_model: int,
        d_ff: int,
        dropout: float,
        activation: str,
        apart: bool,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.conv1 = Pointwise(d_model, d_ff)
        self.conv2 = Pointwise(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout, self.activation, self.apart = dropout, ACTIVATIONS[activation], apart

    def forward(
        self, x: Tensor, encoded: Tensor, last: int | None = None, probe: Probe | None = None
    ) -> Tensor:
        """Run the layer; if `last` is given, for so many tokens only from where the others do not matter."""
        p = self.dropout if self.training else 0.0
        asking = last if self.apart else None
        x = self.norm1(_tail(x, asking) + dropout(self.self_attention(x, x, asking, probe), p))
        x = self.norm2(_tail(x, last) + dropout(self.cross_attention(x, encoded, last, probe), p))
        return self.norm3(x + feed_forward(x, self.conv1, self.conv2, self.activation, p))


def _tail(x: Tensor, last: int | None) -> Tensor:
    return x if last is None else x[:, -last:]


class Decoder(nn.Module):
    """Layers and a final norm.

    Shape:
        x `[B, L, d_model]`, encoded `[B, E, d_model]` -> `[B, last, d_model]`.
    """

    def __init__(self, layers: Sequence[DecoderLayer], d_model: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, encoded: Tensor, last: int, probe: Probe | None = None) -> Tensor:
        """Decode tokens; return the `last` ones."""
        final = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, encoded, last if i == final else None, probe)
        return self.norm(x)
