"""What iTransformer and its kin share: a variate's whole history is one token, and layers mix the tokens.

The models differ in their layers alone. The parameters have the names and shapes of the official code.

Source: arXiv 2310.06625, and the authors' code for what the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from manyheads.core.ops import attention
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import Pointwise
from manyheads.timeseries.models.exogenous import NO_CHANNELS, Channels, CovariateTokens, split_outputs

_EPSILON = 1e-5  # added to the variance of a window


class InvertedEmbedding(nn.Module):
    """Embed the whole history of a variate (or of a calendar feature) as one token.

    Args:
        seq_len: Steps of history.
        d_model: Width of a token.
        dropout: Probability of dropping an element of a token.

    Shape:
        x `[B, N, L]` -> `[B, N, d_model]`.
    """

    def __init__(self, seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(seq_len, d_model)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Embed each history."""
        return dropout(self.value_embedding(x), self.dropout, self.training)


class AttentionLayer(nn.Module):
    """Multi-head attention with the parameter names of this family.

    Args:
        d_model: Width of a token.
        n_heads: Heads; divides d_model.
        dropout: Probability of dropping an attention weight.

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`, Q of them asked.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads = n_heads
        self.dropout = dropout

    def forward(self, x: Tensor, asked: int | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Let the first `asked` tokens, or all, attend to all; append the weights `[B, H, Q, N]`."""
        heads = (self.n_heads, -1)
        q = self.query_projection(x[:, :asked]).unflatten(-1, heads)  # [B, Q, H, D]
        k = self.key_projection(x).unflatten(-1, heads)  # [B, N, H, D]
        v = self.value_projection(x).unflatten(-1, heads)
        if maps is None:
            out = attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        else:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            maps.append(dropout(scores.softmax(dim=-1), self.dropout, self.training))
            out = torch.einsum("bhqk,bkhd->bqhd", maps[-1], v)
        return self.out_projection(out.flatten(-2))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block, each followed by residual and norm.

    Args:
        attention: Mixes tokens `[B, N, d_model]`, as `AttentionLayer` does.
        d_model: Width of a token.
        d_ff: Width of the feed-forward block.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`.
    """

    def __init__(
        self, attention: nn.Module, d_model: int, d_ff: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.attention = attention
        self.conv1 = Pointwise(d_model, d_ff)
        self.conv2 = Pointwise(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, asked: int | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Mix the tokens, then each token's features; for the first `asked` tokens only, if that is given."""
        mixed = dropout(self.attention(x, asked, maps), self.dropout, self.training)
        x = self.norm1(x[:, :asked] + mixed)
        hidden = dropout(self.activation(self.conv1(x)), self.dropout, self.training)
        return self.norm2(x + dropout(self.conv2(hidden), self.dropout, self.training))


class Encoder(nn.Module):
    """A stack of layers and a final norm.

    Args:
        layers: Each is called as an `EncoderLayer` is.
        d_model: Width of a token.

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`, Q of them asked.
    """

    def __init__(self, layers: Sequence[nn.Module], d_model: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, asked: int, maps: list[Tensor] | None = None) -> Tensor:
        """Encode tokens; return the first `asked`.

        What the last layer would make of the others is not computed, unless its attention weights are wanted.
        """
        last = len(self.attn_layers) - 1
        for i, layer in enumerate(self.attn_layers):
            x = layer(x, asked if i == last and maps is None else None, maps)
        return self.norm(x[:, :asked])


class InvertedForecaster(nn.Module):
    """Forecast every variate from its own history and, by the layers, from the others'.

    No parameter depends on the number of variates: any number may be given at inference. Calendar features,
    if given, take part as further tokens, after the variates, and covariates as tokens after these.

    Args:
        layer: Makes one of the layers; they are called as an `EncoderLayer` is.
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        d_model: Width of a token.
        e_layers: How many layers.
        dropout: Probability of dropping an element of an embedded token.
        use_norm: Whether each window is standardised on the way in and restored on the way out.
        channels: The covariates that it takes.
        outputs: Numbers a step and variate; the first is a location.

    Shape:
        x `[B, L, N]`, x_mark `[B, L, M]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`, static `[B, Cs]` ->
        `[B, P, N]`, or `[B, P, N, K]` of several outputs.
    """

    def __init__(
        self,
        layer: Callable[[], nn.Module],
        seq_len: int,
        pred_len: int,
        d_model: int,
        e_layers: int,
        dropout: float,
        use_norm: bool,
        channels: Channels = NO_CHANNELS,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.use_norm, self.channels, self.outputs = use_norm, channels, outputs
        self.enc_embedding = InvertedEmbedding(seq_len, d_model, dropout)
        self.encoder = Encoder([layer() for _ in range(e_layers)], d_model)
        self.projector = nn.Linear(d_model, pred_len * outputs)
        self.covariates = CovariateTokens(channels, pred_len, d_model) if channels else None

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Forecast; the calendar features of the horizon (`y_mark`) are not used.

        Raises:
            ValueError: Not the covariates that the model is built for.
        """
        return self._forecast(x, x_mark, (past, future, static), None)

    def forward_with_attention(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Forecast and return each layer's attention weights.

        Shape:
            The forecast, and a list of `[B, H, T, T]`: row i says what token i takes from the others. The
            tokens are variates, calendar features, past, future and static covariates.

        Raises:
            UsageError: The layers of this model have no such weights.
        """
        maps: list[Tensor] = []
        return self._forecast(x, x_mark, (past, future, static), maps), maps

    def _forecast(
        self,
        x: Tensor,
        x_mark: Tensor | None,
        covariates: tuple[Tensor | None, Tensor | None, Tensor | None],
        maps: list[Tensor] | None,
    ) -> Tensor:
        self.channels.check(*covariates)
        x = x.mT.contiguous()  # [B, N, L]: sums over time read memory in order
        if self.use_norm:
            var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)  # [B, N, 1]
            # The official code stops the mean's gradient only.
            mean, std = mean.detach(), (var + _EPSILON).sqrt()
            x = (x - mean) / std
        series = x if x_mark is None else torch.cat([x, x_mark.mT], dim=1)  # [B, N + M, L]
        tokens = self.enc_embedding(series)
        if self.covariates is not None:
            tokens = torch.cat([tokens, self.covariates(self.enc_embedding, *covariates)], dim=1)
        y = self.projector(self.encoder(tokens, x.shape[1], maps))  # [B, N, P * K]
        return split_outputs(y * std + mean if self.use_norm else y, self.outputs)
