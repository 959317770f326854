"""Informer: sparse attention over time, halved between the layers, and the whole horizon in one pass.

Source: arXiv 2012.07436, and the code of its authors, which has been copied with changes that its checkpoints
do not show. Each change is an argument of `informer`; `checkpoints.py` says whose code has which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.timeseries.models.attention import (
    ACTIVATIONS,
    AttentionLayer,
    FullAttention,
    Probe,
    ProbSparseAttention,
)
from manyheads.timeseries.models.blocks import (
    check_choices,
    check_label,
    check_marks,
    check_positive,
    check_transformer,
    known_label,
)
from manyheads.timeseries.models.embeddings import DataEmbedding, temporal_embedding
from manyheads.timeseries.models.exogenous import (
    NO_CHANNELS,
    Channels,
    check_extras,
    decoder_channels,
    history_channels,
)
from manyheads.timeseries.models.informer_layers import (
    Decoder,
    DecoderLayer,
    DistilLayer,
    Encoder,
    EncoderLayer,
    EncoderStack,
)

_CHOICES: dict[str, tuple[str | int, ...]] = {
    "attn": ("prob", "full"),
    "activation": tuple(ACTIVATIONS),
    "head_layout": ("ordered", "mix_decoder", "scrambled"),
    "distil_padding": (1, 2),
    "cross_attention": ("full", "prob"),
}


class Informer(nn.Module):
    """Forecast all variates together: an encoder reads the history, a decoder writes the horizon in one pass.

    Args:
        enc_embedding: Embeds the history.
        dec_embedding: Embeds the decoder's input.
        encoder: An `Encoder`, or an `EncoderStack`.
        decoder: The decoder.
        projection: From a token to the variates.
        label_len: Steps of the history that the decoder's input begins with.
        pred_len: Steps to forecast.
        channels: The covariates that it takes, as further channels of the embeddings.
        outputs: Numbers a step and variate; the first is a location.

    Shape:
        x `[B, L, N]`, x_mark `[B, L, M]`, y_mark `[B, P, M]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`,
        static `[B, Cs]` -> `[B, P, c_out]`, or `[B, P, c_out, K]` of several outputs.

    Source:
        arXiv 2012.07436.
    """

    def __init__(
        self,
        enc_embedding: DataEmbedding,
        dec_embedding: DataEmbedding,
        encoder: Encoder | EncoderStack,
        decoder: Decoder,
        projection: nn.Linear,
        label_len: int,
        pred_len: int,
        channels: Channels = NO_CHANNELS,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.enc_embedding, self.dec_embedding = enc_embedding, dec_embedding
        self.encoder, self.decoder, self.projection = encoder, decoder, projection
        self.label_len, self.pred_len = label_len, pred_len
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
        return self.forecast(*self._official(x, x_mark, y_mark, past, future, static))

    def forward_with_attention(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Forecast and return each encoder layer's attention weights.

        Shape:
            The forecast, and a list of `[B, H, L_i, L_i]`; a query that does not stand out has 1 / L_i
            everywhere.
        """
        maps: list[Tensor] = []
        return self.forecast(*self._official(x, x_mark, y_mark, past, future, static), maps=maps), maps

    def forecast(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None,
        x_dec: Tensor,
        x_mark_dec: Tensor | None,
        *,
        index_samples: Sequence[Tensor] | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Forecast from what the official code's `forward` takes.

        Args:
            x_enc: The history; covariates are further channels.
            x_mark_enc: Its calendar: features, or with tables the numbers of month, day, weekday, hour, ...
            x_dec: The last `label_len` steps of the history, then zeros.
            x_mark_dec: The calendar of these.
            index_samples: The keys that each sparse attention samples, in the order of the calls; see
                `prob_sparse_attention`.
            maps: Gets the encoder's attention weights.

        Shape:
            x_enc `[B, L, N]`, x_dec `[B, label_len + P, N]` -> `[B, P, c_out]`, or `[B, P, c_out, K]`.

        Raises:
            ValueError: A shape is not the model's, or `index_samples` are too few or too many.
        """
        samples = None if index_samples is None else iter(index_samples)
        encoded = self.encoder(self.enc_embedding(x_enc, x_mark_enc), Probe(samples, maps))
        tokens = self.decoder(self.dec_embedding(x_dec, x_mark_dec), encoded, self.pred_len, Probe(samples))
        if samples is not None and next(samples, None) is not None:
            raise ValueError("index_samples has more entries than there are sparse attentions")
        y = self.projection(tokens)
        return y if self.outputs == 1 else y.unflatten(-1, (-1, self.outputs))

    def _official(
        self,
        x: Tensor,
        x_mark: Tensor | None,
        y_mark: Tensor | None,
        past: Tensor | None,
        future: Tensor | None,
        static: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Make what `forecast` takes."""
        self.channels.check(past, future, static)
        ahead = x.new_zeros(x.shape[0], self.pred_len, x.shape[-1])
        x_dec = decoder_channels(torch.cat([known_label(x, self.label_len), ahead], dim=1), future)
        x = history_channels(x, past, future, static)
        check_marks(x_mark, y_mark)
        if x_mark is None or y_mark is None:
            return x, None, x_dec, None
        to_marks = self.enc_embedding.temporal_embedding.marks
        x_mark = to_marks(x_mark)
        return x, x_mark, x_dec, torch.cat([known_label(x_mark, self.label_len), to_marks(y_mark)], dim=1)


@dataclass(frozen=True)
class _Recipe:
    """The arguments of `informer` that its parts share, checked."""

    seq_len: int
    pred_len: int
    enc_in: int
    c_out: int | None
    label_len: int
    factor: int
    d_model: int
    n_heads: int
    d_layers: int
    d_ff: int
    dropout: float
    attn: str
    embed: str
    freq: str
    activation: str
    distil: bool
    head_layout: str
    distil_padding: int
    cross_attention: str
    embed_bias: bool
    batch_union: bool
    channels: Channels
    outputs: int

    def __post_init__(self) -> None:
        arguments = vars(self)
        positive = ("seq_len", "pred_len", "enc_in", "factor", "d_model", "n_heads", "d_layers", "d_ff")
        check_positive("informer", arguments, positive)
        check_choices("informer", arguments, _CHOICES)
        check_transformer("informer", self.d_model, self.n_heads, self.dropout)
        check_label("informer", self.label_len, self.seq_len)
        check_extras("informer", self.channels, self.outputs, use_norm=False)

    def attention(self, kind: str, causal: bool = False, mix: bool = False) -> AttentionLayer:
        if kind == "full":
            return AttentionLayer(self.d_model, self.n_heads, FullAttention(causal, self.dropout), mix)
        union = self.batch_union and self.n_heads == 1
        attend = ProbSparseAttention(causal, self.factor, union)
        return AttentionLayer(self.d_model, self.n_heads, attend, mix or self.head_layout == "scrambled")

    def encoder(self, depth: int) -> Encoder:
        shape = (self.d_model, self.d_ff, self.dropout, self.activation)
        layers = [EncoderLayer(self.attention(self.attn), *shape) for _ in range(depth)]
        halvings = depth - 1 if self.distil else 0
        distil = [DistilLayer(self.d_model, self.distil_padding) for _ in range(halvings)]
        return Encoder(layers, distil, self.d_model)

    def decoder(self) -> Decoder:
        mix, cross = self.head_layout == "mix_decoder", self.cross_attention
        layers = [
            DecoderLayer(
                self.attention(self.attn, causal=True, mix=mix),
                self.attention(cross),
                self.d_model,
                self.d_ff,
                self.dropout,
                self.activation,
                apart=cross == "full",
            )
            for _ in range(self.d_layers)
        ]
        return Decoder(layers, self.d_model)

    def embedding(self, length: int, channels: int) -> DataEmbedding:
        temporal = temporal_embedding(self.embed, self.freq, self.d_model, self.embed_bias)
        width = self.enc_in + channels
        return DataEmbedding(width, self.d_model, temporal, self.dropout, self.embed_bias, length)

    def model(self, depths: Sequence[int], stacked: bool) -> Informer:
        if min(depths) < 1 or self.seq_len >> len(depths) - 1 < 1:
            raise UsageError(f"informer: no encoders of {list(depths)} layers for seq_len={self.seq_len}")
        encoders = [self.encoder(depth) for depth in depths]
        return Informer(
            self.embedding(self.seq_len, self.channels.total),
            self.embedding(self.label_len + self.pred_len, self.channels.future),
            EncoderStack(encoders) if stacked else encoders[0],
            self.decoder(),
            nn.Linear(self.d_model, (self.enc_in if self.c_out is None else self.c_out) * self.outputs),
            self.label_len,
            self.pred_len,
            self.channels,
            self.outputs,
        )


def informer(
    seq_len: int,
    pred_len: int,
    enc_in: int,
    c_out: int | None = None,
    label_len: int = 48,
    factor: int = 5,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int = 2,
    d_layers: int = 1,
    d_ff: int = 2048,
    dropout: float = 0.05,
    attn: str = "prob",
    embed: str = "timeF",
    freq: str = "h",
    activation: str = "gelu",
    distil: bool = True,
    head_layout: str = "mix_decoder",
    distil_padding: int = 1,
    cross_attention: str = "full",
    embed_bias: bool = True,
    batch_union: bool = False,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> Informer:
    """Build an Informer; the defaults are its authors' code.

    Args:
        seq_len, pred_len, label_len: Steps of history, to forecast, of history for the decoder.
        enc_in, c_out: Variates in and out; as many out as in if None.
        factor: How many keys are sampled and queries attend, in units of the logarithm of the length.
        d_model, n_heads, e_layers, d_layers, d_ff, dropout, activation: Sizes; "gelu" or "relu".
        attn: "prob" for sparse, "full" for dense attention of encoder and decoder each to itself.
        embed, freq: The calendar's embedding, "timeF", "fixed" or "learned", and the data's frequency.
        distil: Whether the series is halved between encoder layers.
        head_layout: Where heads and steps are mixed: "ordered" nowhere, "mix_decoder" where the decoder
            attends to itself, "scrambled" in every sparse attention.
        distil_padding: 2 makes each halving give one token more.
        cross_attention: "full" or "prob": how the decoder attends to the encoder.
        embed_bias: Whether the embeddings have biases.
        batch_union: With one head, let all samples of a batch take the queries that stand out in any: a
            fault of the time-series library, with which a forecast depends on its batch.
        past, future, static: Covariates of each role, as channels; future ones reach the decoder as well.
        outputs: Numbers a step and variate.

    Raises:
        UsageError: An argument is not possible.
    """
    return _Recipe(
        seq_len, pred_len, enc_in, c_out, label_len, factor, d_model, n_heads, d_layers, d_ff, dropout, attn,
        embed, freq, activation, distil, head_layout, distil_padding, cross_attention, embed_bias,
        batch_union, Channels(past, future, static), outputs,
    ).model((e_layers,), stacked=False)  # fmt: skip


def informer_stack(
    seq_len: int,
    pred_len: int,
    enc_in: int,
    c_out: int | None = None,
    label_len: int = 48,
    factor: int = 5,
    d_model: int = 512,
    n_heads: int = 8,
    s_layers: str = "3,2,1",
    d_layers: int = 1,
    d_ff: int = 2048,
    dropout: float = 0.05,
    attn: str = "prob",
    embed: str = "timeF",
    freq: str = "h",
    activation: str = "gelu",
    distil: bool = True,
    head_layout: str = "mix_decoder",
    distil_padding: int = 1,
    cross_attention: str = "full",
    embed_bias: bool = True,
    batch_union: bool = False,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> Informer:
    """Build an Informer of several encoders, each of which reads half as much history as the one before.

    Args:
        s_layers: The encoders' layers, as "3,2,1".

    The others are those of `informer`.

    Raises:
        UsageError: An argument is not possible.
    """
    depths = [int(each) if each.strip().isdecimal() else 0 for each in s_layers.split(",")]
    return _Recipe(
        seq_len, pred_len, enc_in, c_out, label_len, factor, d_model, n_heads, d_layers, d_ff, dropout, attn,
        embed, freq, activation, distil, head_layout, distil_padding, cross_attention, embed_bias,
        batch_union, Channels(past, future, static), outputs,
    ).model(depths, stacked=True)  # fmt: skip
