"""Autoformer of the transformers library: lags in, all steps' distributions out.

Source: transformers 5.23 (AutoformerForPrediction), after arXiv 2106.13008.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import Forecast
from manyheads.timeseries.distributions import Distribution
from manyheads.timeseries.models.blocks import series_decomp
from manyheads.timeseries.models.lagged import (
    Frame,
    History,
    ParameterProjection,
    Scaled,
    Window,
    check_sizes,
    lagged,
    negative_log_likelihood,
)
from manyheads.timeseries.models.lagged_attention import Draws, LaggedCorrelation, Projected
from manyheads.timeseries.models.lagged_layers import AutoformerLayer, Shape, Stack, TrendLayer
from manyheads.timeseries.windows import Batch


class Parts(NamedTuple):
    """What the decoder adds up, of `label_len` steps of the context and of the horizon."""

    season: Tensor  # [B, label_len + P, features]
    trend: Tensor  # [B, label_len + P, features]


class LaggedAutoformer(nn.Module):
    """Forecast distributions of all steps in one pass.

    Args:
        window: Makes features of a batch.
        encoder: Reads the context.
        decoder: Reads the season of the context's end; its layers are `TrendLayer`s.
        seasonality_projection: From a token to a season of features.
        parameter_projection: From features to the distribution's parameters.
        moving_avg: Steps in the trend's moving average.
        label_len: Steps of the context that the decoder's input begins with.
        num_samples: Samples that `generate` draws.

    Shape:
        A `Batch` of x `[B, L, N]` -> `[B, P, N]`.

    Source:
        transformers' AutoformerForPrediction.
    """

    levels: tuple[float, ...] | None = None  # any

    def __init__(
        self,
        window: Window,
        encoder: Stack,
        decoder: Stack,
        seasonality_projection: nn.Linear,
        parameter_projection: ParameterProjection,
        moving_avg: int,
        label_len: int,
        num_samples: int,
    ) -> None:
        super().__init__()
        self.window, self.encoder, self.decoder = window, encoder, decoder
        self.seasonality_projection, self.parameter_projection = seasonality_projection, parameter_projection
        self.moving_avg, self.label_len, self.num_samples = moving_avg, label_len, num_samples

    @property
    def variates(self) -> int:
        """How many variates it takes; they are the same ones, in their order."""
        return self.window.frame.variates

    def forward(self, x: Tensor, x_mark: Tensor | None = None, y_mark: Tensor | None = None) -> Tensor:
        """Forecast; marks are the features of `manyheads.timeseries.calendar`, if the model takes any."""
        return self.predict(self.window.batch(x, x_mark, y_mark)).point

    def predict(self, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
        """Forecast a batch: each step's mean, and its quantiles.

        Args:
            batch: The windows.
            levels: Quantiles wanted.
        """
        with torch.no_grad():
            distribution = self.distribution(self.window.history(batch))
            return Forecast(distribution.mean, distribution.quantile(levels) if levels else None)

    def loss(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of a batch."""
        distribution = self.distribution(self.window.history(batch))
        return negative_log_likelihood(distribution, self.window.target(batch))

    def distribution(self, history: History) -> Distribution:
        """Return the distribution of each step."""
        scaled = self.window(history)
        return self.read(self.decode(scaled, self.encode(scaled)), scaled)

    @torch.no_grad()
    def generate(
        self, history: History, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the horizon, each step for itself.

        Args:
            history: What is known.
            num_samples: Samples a series; None is the model's own number.
            generator: Of the draws; the default one if None.

        Shape:
            `[B, num_samples, P, N]`.
        """
        copies = num_samples or self.num_samples
        scaled = self.window(history)
        encoded = self.encode(scaled)
        # Where samples mix, the copies do, too: the library decodes each of them.
        many = scaled.repeat(copies)
        if self.window.frame.compat == "transformers":
            distribution = self.read(self.decode(many, encoded.repeat_interleave(copies, dim=0)), many)
        else:
            one = self.decode(scaled, encoded)
            distribution = self.read(Parts(*(x.repeat_interleave(copies, dim=0) for x in one)), many)
        return distribution.sample(1, generator)[0].unflatten(0, (-1, copies))

    def encode(self, scaled: Scaled) -> Tensor:
        """Return the encoder's tokens of the context.

        Shape:
            `[B, context, d_model]`.
        """
        features = torch.cat([self._lagged(scaled), scaled.features[:, : self.window.frame.context]], dim=-1)
        return self.encoder(features, 0, None, Draws())

    def decode(self, scaled: Scaled, encoded: Tensor) -> Parts:
        """Return season and trend of the context's end and the horizon."""
        frame, label = self.window.frame, self.label_len
        values = self._lagged(scaled)
        season, trend = (part[:, -label:] for part in series_decomp(values, self.moving_avg))
        mean = values.mean(1, keepdim=True).expand(-1, frame.pred_len, -1)
        known = scaled.features[:, frame.context - label :]  # it stands in both, and so in the trend, too
        season = torch.cat([torch.cat([season, torch.zeros_like(mean)], dim=1), known], dim=-1)
        trend = torch.cat([torch.cat([trend, mean], dim=1), known], dim=-1)
        x, draws = self.decoder.embed(season, frame.context - label), Draws()
        for layer, _ in self.decoder.surviving():
            x, more = layer(x, encoded, draws)
            trend = trend + more
        return Parts(self.seasonality_projection(x), trend)

    def read(self, parts: Parts, scaled: Scaled) -> Distribution:
        """Return the horizon's distributions."""
        return self.parameter_projection(
            (parts.season + parts.trend)[:, -self.window.frame.pred_len :], scaled
        )

    def _lagged(self, scaled: Scaled) -> Tensor:
        frame = self.window.frame
        return lagged(scaled.values, frame.lags, max(frame.lags), frame.context)


def autoformer_lagged(
    seq_len: int,
    pred_len: int,
    enc_in: int = 1,
    lags: str | list[int] | None = None,
    freq: str = "h",
    time_features: int | None = None,
    future: int = 0,
    static: int = 0,
    static_categories: list[int] | None = None,
    embedding_dims: list[int] | None = None,
    label_len: int = 10,
    moving_avg: int = 25,
    factor: int = 3,
    d_model: int = 64,
    n_heads: int = 2,
    dec_heads: int = 2,
    e_layers: int = 2,
    d_layers: int = 2,
    d_ff: int = 32,
    dec_ff: int = 32,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    activation_dropout: float = 0.1,
    enc_layerdrop: float = 0.1,
    dec_layerdrop: float = 0.1,
    activation: str = "gelu",
    scaling: str = "mean",
    output: str = "student_t",
    num_samples: int = 100,
    compat: str = "none",
) -> LaggedAutoformer:
    """Build the transformers library's Autoformer for prediction; the defaults are its own.

    Args:
        label_len: Steps of the context that the decoder's input begins with.
        moving_avg: Steps in the trend's moving average; odd.
        factor: How many lags an attention takes, in units of the logarithm of the length.
        attention_dropout: Not used, as in the library.
        num_samples: Samples that `generate` draws.
        compat: "none" attends as published. "alone" gives each series what the library gives it if nothing
            else is in the batch: with queries cut where they are more than keys. "transformers" gives what
            the library does: lags and weights that belong to other series of the batch.

    The others are those of `informer_lagged`.

    Raises:
        UsageError: An argument is not possible.
    """
    given = locals()
    check_sizes("autoformer_lagged", given)
    frame = Frame.of("autoformer_lagged", given)
    if not 1 <= label_len <= frame.context:
        raise UsageError(f"autoformer_lagged: label_len={label_len} is not in [1, context={frame.context}]")
    if moving_avg < 1 or moving_avg % 2 == 0:
        raise UsageError(f"autoformer_lagged: moving_avg must be odd and positive, not {moving_avg}")
    return _model(frame, given)


def _model(frame: Frame, given: Mapping[str, Any]) -> LaggedAutoformer:
    d_model, dropout, moving_avg = given["d_model"], given["dropout"], given["moving_avg"]

    def attention(heads: int) -> Projected:
        return Projected(d_model, heads, LaggedCorrelation(given["factor"], frame.compat))

    def stack(layers: Sequence[AutoformerLayer | TrendLayer], layerdrop: float) -> Stack:
        positions = frame.context + frame.pred_len
        return Stack(layers, frame.features, d_model, positions, dropout, layerdrop)

    shape = Shape(
        d_model, given["d_ff"], dropout, given["activation_dropout"], given["activation"], moving_avg
    )
    encoder = [AutoformerLayer(shape, attention(given["n_heads"])) for _ in range(given["e_layers"])]
    shape, heads = replace(shape, d_ff=given["dec_ff"]), given["dec_heads"]
    decoder = [
        TrendLayer(shape, attention(heads), attention(heads), frame.features)
        for _ in range(given["d_layers"])
    ]
    return LaggedAutoformer(
        Window(frame),
        stack(encoder, given["enc_layerdrop"]),
        stack(decoder, given["dec_layerdrop"]),
        nn.Linear(d_model, frame.features),
        ParameterProjection(frame.features, frame.variates, given["output"]),
        moving_avg,
        given["label_len"],
        given["num_samples"],
    )
