"""Informer of the transformers library: lags in, a distribution out, step after step.

Its attention chooses by other counts than the paper's, nothing mixes heads and steps, there are no final
norms, and the decoder writes one step at a time, each from samples of those before.

Source: transformers 5.23 (InformerForPrediction), after arXiv 2012.07436.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.timeseries.calls import Forecast
from manyheads.timeseries.distributions import Distribution
from manyheads.timeseries.models.attention import FullAttention
from manyheads.timeseries.models.blocks import check_choices
from manyheads.timeseries.models.informer_layers import DistilLayer
from manyheads.timeseries.models.lagged import (
    Frame,
    History,
    ParameterProjection,
    Scaled,
    Target,
    Window,
    check_sizes,
    lagged,
    negative_log_likelihood,
)
from manyheads.timeseries.models.lagged_attention import Draws, LogSparseAttention, Projected
from manyheads.timeseries.models.lagged_layers import InformerLayer, Shape, Stack
from manyheads.timeseries.windows import Batch

_ROWS = 8192  # paths that a step advances at a time

Pick = Callable[[Distribution, int], Tensor]


class LaggedInformer(nn.Module):
    """Forecast distributions, one step after the other.

    Args:
        window: Makes features of a batch.
        encoder: Reads the context.
        decoder: Reads the horizon's features so far.
        parameter_projection: From a token to the distribution's parameters.
        num_samples: Paths from which quantiles are taken.

    Shape:
        A `Batch` of x `[B, L, N]` -> `[B, P, N]`.

    Source:
        transformers' InformerForPrediction.
    """

    levels: tuple[float, ...] | None = None  # any

    def __init__(
        self,
        window: Window,
        encoder: Stack,
        decoder: Stack,
        parameter_projection: ParameterProjection,
        num_samples: int,
    ) -> None:
        super().__init__()
        self.window, self.encoder, self.decoder = window, encoder, decoder
        self.parameter_projection, self.num_samples = parameter_projection, num_samples

    @property
    def variates(self) -> int:
        """How many variates it takes; they are the same ones, in their order."""
        return self.window.frame.variates

    def forward(self, x: Tensor, x_mark: Tensor | None = None, y_mark: Tensor | None = None) -> Tensor:
        """Forecast; marks are the features of `manyheads.timeseries.calendar`, if the model takes any."""
        return self.predict(self.window.batch(x, x_mark, y_mark)).point

    def predict(self, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
        """Forecast a batch.

        The point is the path on which each step's mean is taken for granted. Quantiles are those of paths
        whose steps are spread evenly over their distributions, in an order that is always the same: they
        repeat, and are the same whatever else is in the batch.

        Args:
            batch: The windows.
            levels: Quantiles wanted.
        """
        with torch.no_grad():
            scaled = self.window(self.window.history(batch))
            encoded = self.encode(scaled, Draws())
            point = self._paths(scaled, encoded, 1, lambda each, _: each.mean, Draws())[:, 0]
            if not levels:
                return Forecast(point, None)
            size = max(1, _ROWS // self.num_samples)
            parts = zip(*(each.split(size) for each in (*scaled, encoded)), strict=True)
            return Forecast(point, torch.cat([self._quantiles(Scaled(*a), b, levels) for *a, b in parts]))

    def loss(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of a batch, each step given the true ones before it."""
        target = self.window.target(batch)
        return negative_log_likelihood(self.distribution(self.window.history(batch), target), target)

    def distribution(
        self, history: History, target: Target, index_samples: Sequence[Tensor] | None = None
    ) -> Distribution:
        """Return the distribution of each step given the true ones before it.

        Args:
            history: What is known.
            target: The truth; a step's own does not reach it.
            index_samples: The keys that each sparse attention samples, `[L]`, in the order of the calls.
        """
        draws = Draws(None if index_samples is None else iter(index_samples))
        scaled = self.window(history)
        encoded = self.encode(scaled, draws)
        ahead = (target.values - scaled.loc) / scaled.scale
        sequence = torch.cat([scaled.values, ahead], dim=1)
        tokens = self.decode(sequence, scaled, encoded, target.values.shape[1], draws)
        return self.parameter_projection(tokens, scaled)

    @torch.no_grad()
    def generate(
        self,
        history: History,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw paths, each step given those drawn before it.

        Args:
            history: What is known.
            num_samples: Paths a series; None is the model's own number.
            generator: Of all draws; the default one if None.

        Shape:
            `[B, num_samples, P, N]`.
        """
        copies = num_samples or self.num_samples
        draws = Draws(generator=generator)
        scaled = self.window(history)
        encoded = self.encode(scaled, draws)
        self._spend_draws(draws)
        return self._paths(scaled, encoded, copies, lambda each, _: each.sample(1, generator)[0], draws)

    def encode(self, scaled: Scaled, draws: Draws) -> Tensor:
        """Return the encoder's tokens of the context.

        Shape:
            `[B, E, d_model]`.
        """
        frame = self.window.frame
        values = lagged(scaled.values, frame.lags, max(frame.lags), frame.context)
        features = torch.cat([values, scaled.features[:, : frame.context]], dim=-1)
        return self.encoder(features, 0, None, draws)

    def decode(self, sequence: Tensor, scaled: Scaled, encoded: Tensor, steps: int, draws: Draws) -> Tensor:
        """Return the decoder's tokens of the first steps of the horizon.

        Args:
            sequence: Normalised values of the history and of the horizon up to the step before the last.
            scaled: The window.
            encoded: The encoder's tokens, of as many samples or of a divisor of them.
            steps: How many.
            draws: What sparse attentions sample.

        Shape:
            `[R, steps, d_model]`.
        """
        frame = self.window.frame
        values = lagged(sequence, frame.lags, frame.seq_len, steps)
        known = scaled.features[:, frame.context : frame.context + steps]
        return self.decoder(torch.cat([values, known], dim=-1), frame.context, encoded, draws)

    def _paths(self, scaled: Scaled, encoded: Tensor, copies: int, pick: Pick, draws: Draws) -> Tensor:
        """Walk `copies` paths a series, each step's value picked from its distribution.

        Shape:
            `[B, copies, P, N]`.
        """
        many = scaled.repeat(copies)
        sequence, path = many.values, []
        for step in range(self.window.frame.pred_len):
            tokens = self.decode(sequence, many, encoded, step + 1, draws)[:, -1:]
            value = pick(self.parameter_projection(tokens, many), step)  # [B * copies, 1, N]
            sequence = torch.cat([sequence, (value - many.loc) / many.scale], dim=1)
            path.append(value)
        return torch.cat(path, dim=1).unflatten(0, (-1, copies))

    def _quantiles(self, scaled: Scaled, encoded: Tensor, levels: Sequence[float]) -> Tensor:
        """Return the quantiles of evenly spread paths, `[B, P, N, Q]`."""
        copies, generator = self.num_samples, torch.Generator().manual_seed(0)
        spread = [(i + 0.5) / copies for i in range(copies)]
        variates = self.variates

        def pick(distribution: Distribution, step: int) -> Tensor:
            order = torch.rand(variates, copies, generator=generator).argsort(1).to(encoded.device)

            def sort(x: Tensor) -> Tensor:
                of_variate = x.unflatten(0, (-1, copies))[:, :, 0].mT  # [B, N, copies]
                return of_variate.gather(2, order.expand_as(of_variate))

            values = type(distribution)(*(sort(x) for x in vars(distribution).values())).at(spread)
            back = torch.empty_like(values).scatter_(2, order.expand_as(values), values)
            return back.mT.flatten(0, 1)[:, None]

        paths = self._paths(scaled, encoded, copies, pick, Draws())
        wanted = torch.tensor(levels, dtype=paths.dtype, device=paths.device)
        return torch.stack([step.quantile(wanted, dim=1) for step in paths.unbind(2)], dim=2).movedim(0, -1)

    def _spend_draws(self, draws: Draws) -> None:
        """Draw what the library draws for a decoder's pass that it makes before the first step, in vain."""
        for module in self.decoder.modules():
            if isinstance(module, LogSparseAttention) and module.drawn:
                draws.keys(1)


def informer_lagged(
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
    factor: int = 5,
    d_model: int = 64,
    n_heads: int = 2,
    dec_heads: int = 2,
    e_layers: int = 2,
    d_layers: int = 2,
    d_ff: int = 32,
    dec_ff: int = 32,
    dropout: float = 0.05,
    attention_dropout: float = 0.1,
    activation_dropout: float = 0.1,
    enc_layerdrop: float = 0.1,
    dec_layerdrop: float = 0.1,
    attn: str = "prob",
    activation: str = "gelu",
    distil: bool = True,
    scaling: str = "mean",
    output: str = "student_t",
    num_samples: int = 100,
    compat: str = "none",
) -> LaggedInformer:
    """Build the transformers library's Informer for prediction; the defaults are its own.

    Args:
        seq_len, pred_len: Steps of history (the longest lag, then the encoder's context), and to forecast.
        enc_in: Variates, forecast together.
        lags: How many steps before each step a token looks, as "1,2,24" or a list; 1 to 7 if None.
        freq, time_features: The data's frequency, or how many calendar features there are.
        future, static, static_categories: Known covariates, static ones, values of each categorical one.
        embedding_dims: Widths of the categories' embeddings; half of the values, 50 at most, if None.
        factor: How many queries attend, in units of the logarithm of the length.
        d_model, n_heads, e_layers, d_ff, dec_heads, d_layers, dec_ff: Sizes, of encoder and decoder.
        dropout, attention_dropout, activation_dropout: Of added blocks, attention weights, hidden features.
        enc_layerdrop, dec_layerdrop: Probability that training leaves a layer out.
        attn, activation: "prob" or "full" attention of steps to each other; "gelu" or "relu".
        distil: Whether the series is halved between encoder layers.
        scaling: By what a window is normalised: "mean" of the absolute values, "std" (and mean), "none".
        output, num_samples: "student_t", "normal", "negative_binomial"; paths from which quantiles are taken.
        compat: "transformers": keys are sampled in evaluation too, and a series without observations takes
            its batch's scale, as there. "none" and "alone" do not, and are the same here.
    """
    given = locals()
    check_sizes("informer_lagged", given)
    check_choices("informer_lagged", given, {"attn": ("prob", "full")})
    return _model(Frame.of("informer_lagged", given), given)


def _model(frame: Frame, given: Mapping[str, Any]) -> LaggedInformer:
    d_model, weight_dropout, dropout = given["d_model"], given["attention_dropout"], given["dropout"]

    def attention(heads: int, causal: bool) -> Projected:
        if given["attn"] == "full":
            return Projected(d_model, heads, FullAttention(causal, weight_dropout))
        drawn = frame.compat == "transformers"
        return Projected(d_model, heads, LogSparseAttention(causal, given["factor"], weight_dropout, drawn))

    def stack(layers: list[InformerLayer], layerdrop: float, halvings: int) -> Stack:
        positions = frame.context + frame.pred_len
        distils = [DistilLayer(d_model) for _ in range(halvings)]
        return Stack(layers, frame.features, d_model, positions, dropout, layerdrop, distils)

    shape = Shape(d_model, given["d_ff"], dropout, given["activation_dropout"], given["activation"])
    encoder = [InformerLayer(shape, attention(given["n_heads"], False)) for _ in range(given["e_layers"])]
    shape, heads = replace(shape, d_ff=given["dec_ff"]), given["dec_heads"]
    decoder = [
        InformerLayer(
            shape,
            attention(heads, True),
            Projected(d_model, heads, FullAttention(False, weight_dropout)),
        )
        for _ in range(given["d_layers"])
    ]
    return LaggedInformer(
        Window(frame),
        stack(encoder, given["enc_layerdrop"], len(encoder) - 1 if given["distil"] else 0),
        stack(decoder, given["dec_layerdrop"], 0),
        ParameterProjection(d_model, frame.variates, given["output"]),
        given["num_samples"],
    )
