"""iTransformer: attention over variates, each of which is one token. arXiv 2310.06625.

The parameters have the names and shapes of the official code, whose checkpoints load strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.ops import attention
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.blocks import Pointwise

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
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
        x `[B, N, d_model]`, asking `[B, Q, d_model]` -> `[B, Q, d_model]`.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads = n_heads
        self.dropout = dropout

    def forward(self, x: Tensor, asking: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Let some tokens attend to all; append the weights `[B, H, Q, N]` to `maps` if it is given."""
        heads = (self.n_heads, -1)
        q = self.query_projection(asking).unflatten(-1, heads)  # [B, Q, H, D]
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
        d_model: Width of a token.
        n_heads: Heads.
        d_ff: Width of the feed-forward block.
        dropout: Probability, for every dropout of the layer.
        activation: "gelu" or "relu".

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`.
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.attention = AttentionLayer(d_model, n_heads, dropout)
        self.conv1 = Pointwise(d_model, d_ff)
        self.conv2 = Pointwise(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = dropout
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor, asked: int | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Mix the tokens, then each token's features; for the first `asked` tokens only, if that is given."""
        asking = x[:, :asked]
        x = self.norm1(asking + dropout(self.attention(x, asking, maps), self.dropout, self.training))
        hidden = dropout(self.activation(self.conv1(x)), self.dropout, self.training)
        return self.norm2(x + dropout(self.conv2(hidden), self.dropout, self.training))


class Encoder(nn.Module):
    """A stack of layers and a final norm."""

    def __init__(self, layers: list[EncoderLayer], d_model: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, asked: int, maps: list[Tensor] | None = None) -> Tensor:
        """Encode tokens `[B, N, d_model]`; return the first `asked`.

        What the last layer would make of the others is not computed, unless its attention weights are wanted.
        """
        last = len(self.attn_layers) - 1
        for i, layer in enumerate(self.attn_layers):
            x = layer(x, asked if i == last and maps is None else None, maps)
        return self.norm(x[:, :asked])


class ITransformer(nn.Module):
    """Forecast every variate from its own history and, by attention, from the others'.

    No parameter depends on the number of variates, and their order does not matter: any number may be given
    at inference. Calendar features, if given, take part as further tokens.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        d_model: Width of a token.
        n_heads: Heads; divides d_model.
        e_layers: Encoder layers.
        d_ff: Width of the feed-forward blocks.
        dropout: Probability, for every dropout.
        activation: "gelu" or "relu".
        use_norm: Whether each window is standardised on the way in and restored on the way out.

    Shape:
        x `[B, L, N]`, x_mark `[B, L, M]` -> `[B, P, N]`.

    Source:
        arXiv 2310.06625, and the authors' code for what the paper leaves open.
    """

    def __init__(
        self,
        seq_len: int,
        pred_len: int,
        d_model: int,
        n_heads: int,
        e_layers: int,
        d_ff: int,
        dropout: float,
        activation: str,
        use_norm: bool,
    ) -> None:
        super().__init__()
        self.use_norm = use_norm
        self.enc_embedding = InvertedEmbedding(seq_len, d_model, dropout)
        layers = [EncoderLayer(d_model, n_heads, d_ff, dropout, activation) for _ in range(e_layers)]
        self.encoder = Encoder(layers, d_model)
        self.projector = nn.Linear(d_model, pred_len)

    def forward(self, x: Tensor, x_mark: Tensor | None = None, y_mark: Tensor | None = None) -> Tensor:
        """Forecast; the calendar features of the horizon (`y_mark`) are not used by this model."""
        return self._forecast(x, x_mark, None)

    def forward_with_attention(self, x: Tensor, x_mark: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Forecast and return each layer's attention weights.

        Shape:
            `[B, P, N]`, and a list of `[B, H, N + M, N + M]`: row i says what token i takes from the others.
        """
        maps: list[Tensor] = []
        return self._forecast(x, x_mark, maps), maps

    def _forecast(self, x: Tensor, x_mark: Tensor | None, maps: list[Tensor] | None) -> Tensor:
        x = x.mT.contiguous()  # [B, N, L]: sums over time read memory in order
        if self.use_norm:
            var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)  # [B, N, 1]
            mean, std = (
                mean.detach(),
                (var + _EPSILON).sqrt(),
            )  # the official code stops the mean's gradient only
            x = (x - mean) / std
        series = x if x_mark is None else torch.cat([x, x_mark.mT], dim=1)  # [B, N + M, L]
        tokens = self.encoder(self.enc_embedding(series), x.shape[1], maps)  # [B, N, d_model]
        y = self.projector(tokens)  # [B, N, P]
        return (y * std + mean if self.use_norm else y).mT


def itransformer(
    seq_len: int,
    pred_len: int,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int = 2,
    d_ff: int = 512,
    dropout: float = 0.1,
    activation: str = "gelu",
    use_norm: bool = True,
) -> ITransformer:
    """Build an iTransformer; the arguments are those of `ITransformer`.

    Raises:
        UsageError: A size is not positive, the heads do not divide d_model, or the activation is unknown.

    Example:
        >>> itransformer(seq_len=96, pred_len=96, d_model=256, d_ff=256)(torch.zeros(2, 96, 7)).shape
        torch.Size([2, 96, 7])
    """
    if min(seq_len, pred_len, d_model, n_heads, e_layers, d_ff) < 1:
        raise UsageError(
            "itransformer: seq_len, pred_len, d_model, n_heads, e_layers and d_ff must be positive"
        )
    if d_model % n_heads:
        raise UsageError(f"itransformer: n_heads={n_heads} does not divide d_model={d_model}")
    if not 0 <= dropout < 1:
        raise UsageError(f"itransformer: dropout must be in [0, 1), not {dropout}")
    if activation not in _ACTIVATIONS:
        raise UsageError(f"itransformer: no activation {activation!r} (gelu, relu)")
    return ITransformer(seq_len, pred_len, d_model, n_heads, e_layers, d_ff, dropout, activation, use_norm)


def load_library_weights(model: ITransformer, state: Mapping[str, Tensor]) -> None:
    """Load a time-series library checkpoint: its `projection` is our `projector`, and it always normalises.

    Args:
        model: Receives the weights.
        state: The library's state dict; every key is used and every shape checked.

    Raises:
        DataError: The model does not normalise, or keys or shapes are not the model's.
    """
    if not model.use_norm:
        raise DataError("the time-series library's iTransformer always normalises: build with use_norm=True")
    if any(key.startswith("projector.") for key in state):
        raise DataError("this state dict has `projector.*` keys: official weights load with load_state_dict")
    head = "projection."
    renamed = {
        "projector." + key[len(head) :] if key.startswith(head) else key: value
        for key, value in state.items()
    }
    try:
        model.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        raise DataError(f"not a time-series library iTransformer of these sizes: {error}") from error
