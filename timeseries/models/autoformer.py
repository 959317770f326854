"""Autoformer: series are split into trend and season again and again, and attend to their own past periods.

Source: arXiv 2106.13008, and the code of its authors, whose parameter names these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import (
    ACTIVATIONS,
    AttentionLayer,
    AutoCorrelation,
    feed_forward,
)
from manyheads.timeseries.models.blocks import (
    Pointwise,
    check_choices,
    check_label,
    check_marks,
    check_positive,
    check_transformer,
    known_label,
    series_decomp,
)
from manyheads.timeseries.models.embeddings import CircularConv, DataEmbedding, temporal_embedding
from manyheads.timeseries.models.exogenous import (
    NO_CHANNELS,
    Channels,
    check_extras,
    history_channels,
)


class SeasonalNorm(nn.Module):
    """A layer norm, less its mean over time.

    Args:
        d_model: Width of a token.

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each step, then centre each channel."""
        x = self.layernorm(x)
        return x - x.mean(1, keepdim=True)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block; after each the trend is taken out.

    Args:
        attention: Mixes the steps.
        d_model: Width of a token.
        d_ff: Width of the feed-forward block.
        moving_avg: Steps in the trend's moving average.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(
        self,
        attention: AttentionLayer,
        d_model: int,
        d_ff: int,
        moving_avg: int,
        dropout: float,
        activation: str,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.conv1 = Pointwise(d_model, d_ff, bias=False)
        self.conv2 = Pointwise(d_ff, d_model, bias=False)
        self.moving_avg, self.dropout, self.activation = moving_avg, dropout, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Mix the steps, then each step's features."""
        p = self.dropout if self.training else 0.0
        x, _ = series_decomp(x + dropout(self.attention(x, x), p), self.moving_avg)
        x, _ = series_decomp(x + feed_forward(x, self.conv1, self.conv2, self.activation, p), self.moving_avg)
        return x


class DecoderLayer(nn.Module):
    """Two attentions and a feed-forward block; the trends taken out after each are projected to the variates.

    Args:
        self_attention: Mixes the decoder's tokens.
        cross_attention: Takes from the encoder's.
        d_model: Width of a token.
        c_out: Variates.
        d_ff: Width of the feed-forward block.
        moving_avg: Steps in the trend's moving average.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".

    Shape:
        x `[B, L, d_model]`, encoded `[B, E, d_model]` -> `[B, L, d_model]`, `[B, L, c_out]`.
    """

    def __init__(
        self,
        self_attention: AttentionLayer,
        cross_attention: AttentionLayer,
        d_model: int,
        c_out: int,
        d_ff: int,
        moving_avg: int,
        dropout: float,
        activation: str,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.conv1 = Pointwise(d_model, d_ff, bias=False)
        self.conv2 = Pointwise(d_ff, d_model, bias=False)
        self.projection = CircularConv(d_model, c_out, bias=False)
        self.moving_avg, self.dropout, self.activation = moving_avg, dropout, ACTIVATIONS[activation]

    def forward(self, x: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the season, and what the layer adds to the trend."""
        p = self.dropout if self.training else 0.0
        x, first = series_decomp(x + dropout(self.self_attention(x, x), p), self.moving_avg)
        x, second = series_decomp(x + dropout(self.cross_attention(x, encoded), p), self.moving_avg)
        x, third = series_decomp(
            x + feed_forward(x, self.conv1, self.conv2, self.activation, p), self.moving_avg
        )
        return x, self.projection(first + second + third)


class Encoder(nn.Module):
    """Layers and a final norm."""

    def __init__(self, layers: Sequence[EncoderLayer], d_model: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.norm = SeasonalNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Encode tokens."""
        for layer in self.attn_layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Layers, a final norm and a projection to the variates."""

    def __init__(self, layers: Sequence[DecoderLayer], d_model: int, c_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = SeasonalNorm(d_model)
        self.projection = nn.Linear(d_model, c_out)

    def forward(self, x: Tensor, encoded: Tensor, trend: Tensor) -> Tensor:
        """Decode tokens `[B, L, d_model]` and a trend `[B, L, c_out]`; return season and trend together."""
        for layer in self.layers:
            x, added = layer(x, encoded)
            trend = trend + added
        return trend + self.projection(self.norm(x))


class Autoformer(nn.Module):
    """Forecast all variates together, season and trend apart.

    In training, attention takes the lags that suit the batch; in evaluation those that suit each sample.

    Args:
        enc_embedding: Embeds the history.
        dec_embedding: Embeds the decoder's season.
        encoder: The encoder.
        decoder: The decoder.
        moving_avg: Steps in the trend's moving average.
        label_len: Steps of the history that the decoder's input begins with.
        pred_len: Steps to forecast.
        channels: The covariates that it takes, as further channels of the embeddings.
        outputs: Numbers a step and variate; the first is a location, to which the trend belongs.

    Shape:
        x `[B, L, N]`, x_mark `[B, L, M]`, y_mark `[B, P, M]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`,
        static `[B, Cs]` -> `[B, P, N]`, or `[B, P, N, K]` of several outputs.

    Source:
        arXiv 2106.13008.
    """

    def __init__(
        self,
        enc_embedding: DataEmbedding,
        dec_embedding: DataEmbedding,
        encoder: Encoder,
        decoder: Decoder,
        moving_avg: int,
        label_len: int,
        pred_len: int,
        channels: Channels = NO_CHANNELS,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.enc_embedding, self.dec_embedding = enc_embedding, dec_embedding
        self.encoder, self.decoder = encoder, decoder
        self.moving_avg, self.label_len, self.pred_len = moving_avg, label_len, pred_len
        self.channels, self.outputs = channels, outputs

    @property
    def variates(self) -> int:
        """How many variates it takes; they are the same ones, in their order."""
        return self.enc_embedding.variates - self.channels.total

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Forecast; marks are the calendar features of `manyheads.timeseries.calendar`.

        Raises:
            ValueError: Not the variates or covariates that the model is built for.
        """
        check_marks(x_mark, y_mark)
        covariates = (past, future, static)
        if x_mark is None or y_mark is None:
            return self.forecast(x, None, None, None, *covariates)
        to_marks = self.enc_embedding.temporal_embedding.marks
        x_mark = to_marks(x_mark)
        label = known_label(x_mark, self.label_len)
        return self.forecast(x, x_mark, None, torch.cat([label, to_marks(y_mark)], dim=1), *covariates)

    def forecast(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None,
        x_dec: Tensor | None,
        x_mark_dec: Tensor | None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Forecast from what the official code's `forward` takes.

        Args:
            x_enc: The history.
            x_mark_enc: Its calendar: features, or with tables the numbers of month, day, weekday, hour, ...
            x_dec: Not read: the decoder begins with season and trend of the history.
            x_mark_dec: The calendar of the last `label_len` steps and of the steps to forecast.
            past, future, static: Covariates.

        Shape:
            x_enc `[B, L, N]`, x_mark_dec `[B, label_len + P, M]` -> `[B, P, N]`.
        """
        self.channels.check(past, future, static)
        history = history_channels(x_enc, past, future, static)
        encoded = self.encoder(self.enc_embedding(history, x_mark_enc))
        season, trend = (known_label(part, self.label_len) for part in series_decomp(x_enc, self.moving_avg))
        mean = x_enc.mean(1, keepdim=True).expand(-1, self.pred_len, -1)
        season = torch.cat([season, torch.zeros_like(mean)], dim=1)  # [B, label_len + P, N]
        tokens = self.dec_embedding(self._decoder_channels(season, past, future, static), x_mark_dec)
        trend = torch.cat([trend, mean], dim=1)
        if self.outputs == 1:
            return self.decoder(tokens, encoded, trend)[:, -self.pred_len :]
        trend = F.pad(trend[..., None], (0, self.outputs - 1)).flatten(-2)  # [B, label_len + P, N * K]
        y = self.decoder(tokens, encoded, trend)[:, -self.pred_len :]
        return y.unflatten(-1, (-1, self.outputs))

    def _decoder_channels(
        self, season: Tensor, past: Tensor | None, future: Tensor | None, static: Tensor | None
    ) -> Tensor:
        """Put all covariates beside the decoder's season: the encoder's tokens have lost every level.

        Past ones go on with their mean, as the trend does.
        """
        if past is not None:
            mean = past.mean(1, keepdim=True).expand(-1, self.pred_len, -1)
            past = torch.cat([known_label(past, self.label_len), mean], dim=1)
        ahead = None if future is None else future[:, -season.shape[1] :]
        return history_channels(season, past, ahead, static)


def autoformer(
    seq_len: int,
    pred_len: int,
    enc_in: int,
    label_len: int = 48,
    moving_avg: int = 25,
    factor: int = 3,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int = 2,
    d_layers: int = 1,
    d_ff: int = 2048,
    dropout: float = 0.05,
    embed: str = "timeF",
    freq: str = "h",
    activation: str = "gelu",
    even_lags: bool = False,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> Autoformer:
    """Build an Autoformer; the defaults are its authors' code and scripts.

    Args:
        seq_len, pred_len, label_len: Steps of history, to forecast, of history for the decoder.
        enc_in: Variates.
        moving_avg: Steps in the trend's moving average; odd.
        factor: How many lags an attention takes, in units of the logarithm of the length.
        d_model, n_heads, e_layers, d_layers, d_ff, dropout, activation: Sizes; "gelu" or "relu".
        embed, freq: The calendar's embedding, "timeF", "fixed" or "learned", and the data's frequency.
        even_lags: Correlate as the time-series library does, which differs where a length is odd.
        past, future, static: Covariates of each role, as channels of encoder and decoder.
        outputs: Numbers a step and variate.

    Raises:
        UsageError: An argument is not possible.
    """
    _check(locals())
    channels = Channels(past, future, static)
    check_extras("autoformer", channels, outputs, use_norm=False)

    def attention() -> AttentionLayer:
        return AttentionLayer(d_model, n_heads, AutoCorrelation(factor, even_lags))

    def embedding(covariates: int) -> DataEmbedding:
        temporal = temporal_embedding(embed, freq, d_model, bias=False)
        return DataEmbedding(enc_in + covariates, d_model, temporal, dropout, bias=False, positions=0)

    tail, c_out = (d_ff, moving_avg, dropout, activation), enc_in * outputs
    encoder = [EncoderLayer(attention(), d_model, *tail) for _ in range(e_layers)]
    decoder = [DecoderLayer(attention(), attention(), d_model, c_out, *tail) for _ in range(d_layers)]
    lengths = (moving_avg, label_len, pred_len)
    embeddings = (embedding(channels.total), embedding(channels.total))
    parts = (Encoder(encoder, d_model), Decoder(decoder, d_model, c_out))
    return Autoformer(*embeddings, *parts, *lengths, channels, outputs)


def _check(given: dict[str, Any]) -> None:
    """Refuse arguments of `autoformer` that are not possible."""
    sizes = ("seq_len", "pred_len", "enc_in", "factor", "d_model", "n_heads", "e_layers", "d_layers", "d_ff")
    check_positive("autoformer", given, sizes)
    check_choices("autoformer", given, {"activation": tuple(ACTIVATIONS)})
    check_transformer("autoformer", given["d_model"], given["n_heads"], given["dropout"])
    check_label("autoformer", given["label_len"], given["seq_len"])
    average = given["moving_avg"]
    if average < 1 or average % 2 == 0:
        raise UsageError(f"autoformer: moving_avg must be odd and positive, not {average}")
