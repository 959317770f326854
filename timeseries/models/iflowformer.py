"""iFlowformer: iTransformer with Flow attention over the variates, linear in their number.

The parameters have the names and shapes of the official code; they are iTransformer's.

Source: arXiv 2310.06625, and arXiv 2202.06258 for Flow attention.
"""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import flow_attention
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import check_choices, check_positive, check_transformer
from manyheads.timeseries.models.exogenous import Channels, check_extras
from manyheads.timeseries.models.inverted import EncoderLayer, InvertedForecaster


class FlowAttentionLayer(nn.Module):
    """Multi-head Flow attention with the parameter names of this family.

    As in the official code, the flows of the sources are not bounded before they compete.

    Args:
        d_model: Width of a token.
        n_heads: Heads; divides d_model.

    Shape:
        x `[B, N, d_model]` -> `[B, Q, d_model]`, Q of them asked.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads = n_heads

    def forward(self, x: Tensor, asked: int | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Let all tokens attend to all, and return the first `asked`, or all.

        Raises:
            UsageError: `maps` is given, but the weights of pairs are never formed.
        """
        if maps is not None:
            raise UsageError("Flow attention forms no weights of pairs to show")
        heads = (self.n_heads, -1)
        q = self.query_projection(x).unflatten(-1, heads)  # every query takes part in the sources' flows
        k = self.key_projection(x).unflatten(-1, heads)
        v = self.value_projection(x).unflatten(-1, heads)
        out = flow_attention(q, k, v, clamp=None)[:, :asked]
        return self.out_projection(out.flatten(-2))


def iflowformer(
    seq_len: int,
    pred_len: int,
    d_model: int = 512,
    n_heads: int = 8,
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
    """Build an iFlowformer; the order of the variates does not matter to it.

    Args:
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        d_model: Width of a token.
        n_heads: Heads; divides d_model.
        e_layers: Encoder layers.
        d_ff: Width of the feed-forward blocks.
        dropout: Probability, for every dropout (attention itself has none).
        activation: "gelu" or "relu".
        use_norm: Whether each window is standardised on the way in and restored on the way out.
        past, future, static: Covariates of each role; each is a token.
        outputs: Numbers a step and variate; more than one needs use_norm=False.

    Raises:
        UsageError: A size is not positive, the heads do not divide d_model, or the activation is unknown.

    Source:
        arXiv 2310.06625, arXiv 2202.06258.

    Example:
        >>> iflowformer(seq_len=96, pred_len=96, d_model=256, d_ff=256)(torch.zeros(2, 96, 7)).shape
        torch.Size([2, 96, 7])
    """
    given = locals()
    check_positive("iflowformer", given, ("seq_len", "pred_len", "d_model", "n_heads", "e_layers", "d_ff"))
    check_transformer("iflowformer", d_model, n_heads, dropout)
    check_choices("iflowformer", given, {"activation": tuple(ACTIVATIONS)})
    channels = Channels(past, future, static)
    check_extras("iflowformer", channels, outputs, use_norm)

    def layer() -> EncoderLayer:
        return EncoderLayer(FlowAttentionLayer(d_model, n_heads), d_model, d_ff, dropout, activation)

    sizes = (seq_len, pred_len, d_model, e_layers)
    return InvertedForecaster(layer, *sizes, dropout, use_norm, channels, outputs)
