"""Series classifiers: the encoder of a forecaster, its tokens averaged over time, and one linear map.

The recipe of the time-series library (encoder, GELU, dropout, linear map), with one change: tokens along time
are averaged over the steps that there are, not laid side by side. A class then does not depend on where in
the window something happens, which small sets cannot teach.

Source: the classification task of the time-series library, whose paper is arXiv 2210.02186.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.catalog import builder, create_model, find
from manyheads.core.errors import UsageError
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import Probe
from manyheads.timeseries.models.autoformer import Autoformer
from manyheads.timeseries.models.blocks import check_positive
from manyheads.timeseries.models.informer import Informer
from manyheads.timeseries.models.inverted import InvertedForecaster
from manyheads.timeseries.models.patchtst import PatchTST

Encode = Callable[[Tensor], Tensor]  # [B, L, C] -> [B, groups, tokens along time, d_model]
ENCODERS = ("informer", "autoformer", "patchtst", "itransformer", "s_mamba", "iflowformer")


class SeriesClassifier(nn.Module):
    """Tell the class of a series of several channels.

    Args:
        parts: The embedding and the encoder, under their names in the forecaster.
        encode: Makes tokens with them.
        features: Elements of a series' tokens after the average over time.
        classes: How many classes.
        dropout: Probability of dropping one of these elements.

    Shape:
        x `[B, L, C]`, observed `[B, L]` bool -> logits `[B, classes]`.
    """

    def __init__(
        self, parts: dict[str, nn.Module], encode: Encode, features: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.projection = nn.Linear(features, classes)
        self.dropout = dropout
        self._encode = encode

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Classify; `observed` is False where a series that is shorter than the window was padded."""
        tokens = F.gelu(self._encode(x))  # [B, G, T, d]
        if tokens.shape[2] == x.shape[1]:
            there = observed[:, None, :, None]  # [B, 1, L, 1]
            mean = (tokens * there).sum(dim=2) / there.sum(dim=2).clamp(min=1)
        else:
            mean = tokens.mean(dim=2)
        return self.projection(dropout(mean.flatten(1), self.dropout, self.training))


def _steps(model: Informer | Autoformer) -> tuple[dict[str, nn.Module], Encode]:
    """Tokens are steps, all channels together."""
    embedding, encoder = model.enc_embedding, model.encoder
    embedding.register_module("temporal_embedding", nn.Identity())  # there is no calendar

    def encode(x: Tensor) -> Tensor:
        embedded = embedding(x, None)
        tokens = encoder(embedded, Probe(None)) if isinstance(model, Informer) else encoder(embedded)
        return tokens[:, None]  # [B, 1, L, d]

    return {"enc_embedding": embedding, "encoder": encoder}, encode


def _patches(model: PatchTST) -> tuple[dict[str, nn.Module], Encode]:
    """Tokens are patches of a channel, the channels apart."""
    embedding, encoder = model.patch_embedding, model.encoder

    def encode(x: Tensor) -> Tensor:
        tokens = encoder(embedding(x.mT.flatten(0, 1)))  # [B * C, patches, d]
        return tokens.unflatten(0, (x.shape[0], -1))

    return {"patch_embedding": embedding, "encoder": encoder}, encode


def _channels(model: InvertedForecaster) -> tuple[dict[str, nn.Module], Encode]:
    """A token is a channel's whole series."""
    embedding, encoder = model.enc_embedding, model.encoder

    def encode(x: Tensor) -> Tensor:
        return encoder(embedding(x.mT.contiguous()), x.shape[-1])[:, :, None]  # [B, C, 1, d]

    return {"enc_embedding": embedding, "encoder": encoder}, encode


def encoder_of(model: nn.Module) -> tuple[dict[str, nn.Module], Encode]:
    """Take the encoder out of a forecaster: its parts by name, and how they make tokens.

    Raises:
        UsageError: It has none.
    """
    if isinstance(model, Informer | Autoformer):
        return _steps(model)
    if isinstance(model, PatchTST):
        return _patches(model)
    if isinstance(model, InvertedForecaster):
        return _channels(model)
    raise UsageError(f"{type(model).__name__} has no encoder (those that have: {', '.join(ENCODERS)})")


def classifier(
    base: str,
    seq_len: int,
    channels: int,
    classes: int,
    arguments: dict[str, bool | int | float | str | None] | None = None,
    dropout: float = 0.1,
) -> SeriesClassifier:
    """Build a classifier on the encoder of a forecaster.

    Args:
        base: The forecaster's catalogue name: informer, autoformer, patchtst, itransformer, ...
        seq_len: Steps of the window; shorter series are padded.
        channels: Values a step.
        classes: How many classes.
        arguments: The forecaster's own options.
        dropout: Probability of dropping an element of what the last linear map sees.

    Raises:
        UsageError: A size is not positive, the base has no encoder, or an argument is not the base's.

    Example:
        >>> model = classifier("informer", seq_len=29, channels=12, classes=9, arguments={"distil": False})
        >>> model(torch.zeros(2, 29, 12), torch.ones(2, 29, dtype=torch.bool)).shape
        torch.Size([2, 9])
    """
    check_positive("classifier", locals(), ("seq_len", "channels", "classes"))
    if base not in ENCODERS:
        raise UsageError(f"classifier: no encoder {base!r} (there are: {', '.join(ENCODERS)})")
    sizes: dict[str, object] = {"seq_len": seq_len, "pred_len": 1}
    given = builder(find(base)).__annotations__
    if "enc_in" in given:
        sizes |= {"enc_in": channels, "label_len": 0}
    if "use_norm" in given:
        sizes["use_norm"] = False  # the scale of a series may be what tells its class
    model = create_model(base, **{**(arguments or {}), **sizes}).eval()  # a trial run leaves no trace
    parts, encode = encoder_of(model)
    with torch.no_grad():
        features = encode(torch.zeros(2, seq_len, channels))[0, :, 0].numel()
    return SeriesClassifier(parts, encode, features, classes, dropout).train()
