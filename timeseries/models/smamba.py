"""S-Mamba: state space scans over the variates from both ends, in place of attention. arXiv 2403.11144.

The parameters have the names and shapes of the official code.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.layers.mamba import Mamba
from manyheads.core.ops.dropout import dropout
from manyheads.core.weights import check_fit
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import (
    Pointwise,
    check_choices,
    check_positive,
    check_transformer,
)
from manyheads.timeseries.models.exogenous import Channels, check_extras
from manyheads.timeseries.models.inverted import InvertedForecaster


class MambaLayer(nn.Module):
    """Two Mamba blocks over the tokens and a feed-forward block, each followed by residual and norm.

    Args:
        d_model: Width of a token.
        d_state: States a channel.
        d_ff: Width of the feed-forward block.
        dropout: Probability, for the dropouts of the feed-forward block.
        activation: "gelu" or "relu".

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`, Q of them asked.
    """

    def __init__(self, d_model: int, d_state: int, d_ff: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.attention = Mamba(d_model, d_state=d_state, d_conv=2, expand=1)
        self.attention_r = Mamba(d_model, d_state=d_state, d_conv=2, expand=1)
        self.conv1 = Pointwise(d_model, d_ff)
        self.conv2 = Pointwise(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, asked: int | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Mix the tokens, then each token's features; for the first `asked` tokens only, if that is given.

        Raises:
            UsageError: `maps` is given, but scans have no attention weights.
        """
        if maps is not None:
            raise UsageError("S-Mamba scans the variates: it has no attention weights")
        # The scan from the first token on needs none of those after the ones asked for.
        ahead = self.attention(x[:, :asked])
        back = self.attention_r(x.flip(1)).flip(1)[:, :asked]
        x = self.norm1(x[:, :asked] + ahead + back)
        hidden = dropout(self.activation(self.conv1(x)), self.dropout, self.training)
        return self.norm2(x + dropout(self.conv2(hidden), self.dropout, self.training))


def s_mamba(
    seq_len: int,
    pred_len: int,
    d_model: int = 512,
    d_state: int = 16,
    e_layers: int = 2,
    d_ff: int = 512,
    dropout: float = 0.1,
    activation: str = "gelu",
    use_norm: bool = True,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> InvertedForecaster:
    """Build an S-Mamba; any number of variates may be given, but their order matters to it.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        d_model: Width of a token.
        d_state: States a channel of the scans.
        e_layers: Layers, each with a scan from either end.
        d_ff: Width of the feed-forward blocks.
        dropout: Probability, for every dropout.
        activation: "gelu" or "relu".
        use_norm: Whether each window is standardised on the way in and restored on the way out.
        past, future, static: Covariates of each role; each is a token.
        outputs: Numbers a step and variate; more than one needs use_norm=False.

    Raises:
        UsageError: A size is not positive, the dropout no probability, or the activation unknown.

    Source:
        arXiv 2403.11144.

    Example:
        >>> s_mamba(seq_len=96, pred_len=96, d_model=256, d_ff=256, d_state=2)(torch.zeros(2, 96, 7)).shape
        torch.Size([2, 96, 7])
    """
    given = locals()
    check_positive("s_mamba", given, ("seq_len", "pred_len", "d_model", "d_state", "e_layers", "d_ff"))
    check_transformer("s_mamba", d_model, 1, dropout)
    check_choices("s_mamba", given, {"activation": tuple(ACTIVATIONS)})
    channels = Channels(past, future, static)
    check_extras("s_mamba", channels, outputs, use_norm)

    def layer() -> MambaLayer:
        return MambaLayer(d_model, d_state, d_ff, dropout, activation)

    sizes = (seq_len, pred_len, d_model, e_layers)
    return InvertedForecaster(layer, *sizes, dropout, use_norm, channels, outputs)


def load_official_weights(model: InvertedForecaster, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of the official code, whose layers hold modules that never run: these are left out.

    Args:
        model: Receives the weights.
        state: The official state dict; every other key is used and every shape checked.

    Raises:
        DataError: The model is no S-Mamba, or keys or shapes are not its own.

    Example:
        >>> state = torch.load("checkpoint.pth", weights_only=True)
        >>> load_official_weights(s_mamba(96, 96, d_model=256, d_ff=256, d_state=2), state)
    """
    layers = model.encoder.attn_layers
    if not all(isinstance(layer, MambaLayer) for layer in layers):
        raise DataError("these weights are loaded into a model built by s_mamba")
    dead = tuple(
        f"encoder.attn_layers.{i}.{name}." for i in range(len(layers)) for name in ("man", "man2", "a")
    )
    rest = {key: value for key, value in state.items() if not key.startswith(dead)}
    check_fit(model, rest, "S-Mamba")
    model.load_state_dict(rest)
