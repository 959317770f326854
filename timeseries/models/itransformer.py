"""iTransformer: attention over variates, each of which is one token. arXiv 2310.06625.

The parameters have the names and shapes of the official code, whose checkpoints load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.core.weights import check_fit
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import check_choices, check_positive, check_transformer
from manyheads.timeseries.models.exogenous import Channels, check_extras
from manyheads.timeseries.models.inverted import AttentionLayer, EncoderLayer, InvertedForecaster


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
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> InvertedForecaster:
    """Build an iTransformer; the order of the variates does not matter to it.

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
        past, future, static: Covariates of each role; each is a token.
        outputs: Numbers a step and variate; more than one needs use_norm=False.

    Raises:
        UsageError: A size is not positive, the heads do not divide d_model, or the activation is unknown.

    Source:
        arXiv 2310.06625.

    Example:
        >>> itransformer(seq_len=96, pred_len=96, d_model=256, d_ff=256)(torch.zeros(2, 96, 7)).shape
        torch.Size([2, 96, 7])
    """
    given = locals()
    check_positive("itransformer", given, ("seq_len", "pred_len", "d_model", "n_heads", "e_layers", "d_ff"))
    check_transformer("itransformer", d_model, n_heads, dropout)
    check_choices("itransformer", given, {"activation": tuple(ACTIVATIONS)})
    channels = Channels(past, future, static)
    check_extras("itransformer", channels, outputs, use_norm)

    def layer() -> EncoderLayer:
        mixer = AttentionLayer(d_model, n_heads, dropout)
        return EncoderLayer(mixer, d_model, d_ff, dropout, activation)

    sizes = (seq_len, pred_len, d_model, e_layers)
    return InvertedForecaster(layer, *sizes, dropout, use_norm, channels, outputs)


def load_library_weights(model: InvertedForecaster, state: Mapping[str, Tensor]) -> None:
    """Load a time-series library checkpoint: its `projection` is our `projector`, and it always normalises.

    Args:
        model: Receives the weights.
        state: The library's state dict; every key is used and every shape checked.

    Raises:
        DataError: The model does not normalise, or keys or shapes are not the model's.
    """
    if not all(isinstance(layer.attention, AttentionLayer) for layer in model.encoder.attn_layers):
        raise DataError("iTransformer's weights are loaded into a model built by itransformer")
    if not model.use_norm:
        raise DataError("the time-series library's iTransformer always normalises: build with use_norm=True")
    if any(key.startswith("projector.") for key in state):
        raise DataError("this state dict has `projector.*` keys: official weights load with load_state_dict")
    head = "projection."
    renamed = {
        "projector." + key[len(head) :] if key.startswith(head) else key: value
        for key, value in state.items()
    }
    check_fit(model, renamed, "iTransformer")
    model.load_state_dict(renamed)
