"""The layers of the transformers library's Informer and Autoformer for prediction, with its parameter names.

They differ from the papers' in norms, biases and dropouts; `lagged_informer.py` and `lagged_autoformer.py`
are the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.autoformer import SeasonalNorm
from manyheads.timeseries.models.blocks import series_decomp
from manyheads.timeseries.models.embeddings import CircularConv
from manyheads.timeseries.models.informer_layers import DistilLayer
from manyheads.timeseries.models.lagged_attention import Draws, Projected


@dataclass(frozen=True)
class Shape:
    """What the layers of a stack have in common.

    Args:
        d_model: Width of a token.
        d_ff: Width of the feed-forward block.
        dropout: Probability of dropping an element of what a block adds.
        activation_dropout: Of dropping an element inside the feed-forward block.
        activation: "gelu" or "relu".
        moving_avg: Steps in the trend's moving average, where there is one.
    """

    d_model: int
    d_ff: int
    dropout: float
    activation_dropout: float
    activation: str
    moving_avg: int = 1


class InformerLayer(nn.Module):
    """Attention, in a decoder another to the encoder's tokens, a feed-forward block; residuals and norms.

    Shape:
        x `[R, L, d_model]`, encoded `[B, E, d_model]` where R is a multiple of B -> `[R, L, d_model]`.
    """

    def __init__(self, shape: Shape, self_attn: Projected, encoder_attn: Projected | None = None) -> None:
        super().__init__()
        self.shape, self.activation = shape, ACTIVATIONS[shape.activation]
        self.self_attn = self_attn
        self.self_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.encoder_attn = encoder_attn
        self.encoder_attn_layer_norm = None if encoder_attn is None else nn.LayerNorm(shape.d_model)
        self.fc1 = nn.Linear(shape.d_model, shape.d_ff)
        self.fc2 = nn.Linear(shape.d_ff, shape.d_model)
        self.final_layer_norm = nn.LayerNorm(shape.d_model)

    def forward(self, x: Tensor, encoded: Tensor | None, draws: Draws) -> Tensor:
        """Mix the steps, then each step's features."""
        p = self.shape.dropout if self.training else 0.0
        x = self.self_attn_layer_norm(x + dropout(self.self_attn(x, x, draws), p))
        if self.encoder_attn is not None and self.encoder_attn_layer_norm is not None and encoded is not None:
            # Several rows of one sample are, to this attention, further queries of it.
            queries = x.reshape(encoded.shape[0], -1, x.shape[-1])
            found = self.encoder_attn(queries, encoded, draws).view_as(x)
            x = self.encoder_attn_layer_norm(x + dropout(found, p))
        return self.final_layer_norm(x + feed_forward(self, x))


class AutoformerLayer(nn.Module):
    """An encoder's layer: attention and a feed-forward block; after each the trend is taken out.

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(self, shape: Shape, self_attn: Projected) -> None:
        super().__init__()
        self.shape, self.activation = shape, ACTIVATIONS[shape.activation]
        self.self_attn = self_attn
        self.self_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.fc1 = nn.Linear(shape.d_model, shape.d_ff)
        self.fc2 = nn.Linear(shape.d_ff, shape.d_model)
        self.final_layer_norm = SeasonalNorm(shape.d_model)

    def forward(self, x: Tensor, encoded: Tensor | None, draws: Draws) -> Tensor:
        """Mix the steps, then each step's features."""
        p = self.shape.dropout if self.training else 0.0
        x = self.self_attn_layer_norm(x + dropout(self.self_attn(x, x, draws), p))
        x, _ = series_decomp(x, self.shape.moving_avg)
        x, _ = series_decomp(x + feed_forward(self, x), self.shape.moving_avg)
        return self.final_layer_norm(x)


class TrendLayer(nn.Module):
    """A decoder's layer of Autoformer; the trends taken out after each block are projected to the features.

    Args:
        shape: Widths and dropouts.
        self_attn: Mixes the decoder's tokens.
        encoder_attn: Takes from the encoder's.
        features: Width of the trend.

    Shape:
        x `[B, L, d_model]`, encoded `[B, E, d_model]` -> `[B, L, d_model]`, `[B, L, features]`.
    """

    def __init__(self, shape: Shape, self_attn: Projected, encoder_attn: Projected, features: int) -> None:
        super().__init__()
        self.shape, self.activation = shape, ACTIVATIONS[shape.activation]
        self.self_attn, self.encoder_attn = self_attn, encoder_attn
        self.self_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.encoder_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.fc1 = nn.Linear(shape.d_model, shape.d_ff)
        self.fc2 = nn.Linear(shape.d_ff, shape.d_model)
        self.final_layer_norm = SeasonalNorm(shape.d_model)
        self.trend_projection = CircularConv(shape.d_model, features, bias=False)

    def forward(self, x: Tensor, encoded: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the season, and what the layer adds to the trend."""
        p, moving_avg = self.shape.dropout if self.training else 0.0, self.shape.moving_avg
        x, first = series_decomp(x + dropout(self.self_attn(x, x, draws), p), moving_avg)
        x = self.self_attn_layer_norm(x)
        x, second = series_decomp(x + dropout(self.encoder_attn(x, encoded, draws), p), moving_avg)
        x = self.encoder_attn_layer_norm(x)
        x, third = series_decomp(x + feed_forward(self, x), moving_avg)
        return self.final_layer_norm(x), self.trend_projection(first + second + third)


def feed_forward(layer: InformerLayer | AutoformerLayer | TrendLayer, x: Tensor) -> Tensor:
    """Map each step by a layer's two maps, with a dropout after each."""
    shape, training = layer.shape, layer.training
    hidden = dropout(layer.activation(layer.fc1(x)), shape.activation_dropout, training)
    return dropout(layer.fc2(hidden), shape.dropout, training)


class _Projection(nn.Module):
    def __init__(self, features: int, d_model: int) -> None:
        super().__init__()
        self.value_projection = nn.Linear(features, d_model, bias=False)


class _Positions(nn.Module):
    """A table of sinusoids, all sines before all cosines; stored, as in the library's checkpoints."""

    weight: Tensor

    def __init__(self, count: int, d_model: int) -> None:
        super().__init__()
        columns = torch.arange(d_model, dtype=torch.float64)
        rates = 10000 ** (-2 * (columns // 2) / d_model)
        angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
        table = torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1)
        self.register_buffer("weight", table.float())


class Stack(nn.Module):
    """An embedding of features and positions, and layers.

    Args:
        layers: The layers.
        features: Width of what is embedded.
        d_model: Width of a token.
        positions: How many positions there are.
        dropout: Probability of dropping an element of an embedded token.
        layerdrop: Probability of leaving a layer out, in training.
        halvings: What follows each layer but the last; or nothing.
    """

    def __init__(
        self,
        layers: Sequence[InformerLayer | AutoformerLayer | TrendLayer],
        features: int,
        d_model: int,
        positions: int,
        dropout: float,
        layerdrop: float,
        halvings: Sequence[DistilLayer] = (),
    ) -> None:
        super().__init__()
        self.value_embedding = _Projection(features, d_model)
        self.embed_positions = _Positions(positions, d_model)
        self.layers = nn.ModuleList(layers)
        self.layernorm_embedding = nn.LayerNorm(d_model)
        self.conv_layers = nn.ModuleList(halvings)
        self.dropout, self.layerdrop = dropout, layerdrop

    def forward(self, x: Tensor, first: int, encoded: Tensor | None, draws: Draws) -> Tensor:
        """Embed features and run the layers.

        Args:
            x: Features.
            first: Position of the first step.
            encoded: Tokens of the encoder, in a decoder.
            draws: What sparse attentions sample.

        Shape:
            x `[R, L, features]`, encoded `[B, E, d_model]` -> `[R, L', d_model]`.
        """
        x = self.embed(x, first)
        for layer, halve in self.surviving():
            x = layer(x, encoded, draws)
            x = x if halve is None else halve(x)
        return x

    def embed(self, x: Tensor, first: int) -> Tensor:
        """Make tokens of features, whose first step stands at a position."""
        places = self.embed_positions.weight[first : first + x.shape[1]]
        tokens = self.layernorm_embedding(self.value_embedding.value_projection(x) + places)
        return dropout(tokens, self.dropout, self.training)

    def surviving(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Give the layers that are not left out, each with the halving that goes with it."""
        for i, layer in enumerate(self.layers):
            if self.training and self.layerdrop > 0 and float(torch.rand([])) < self.layerdrop:
                continue
            yield layer, self.conv_layers[i] if i < len(self.conv_layers) else None
