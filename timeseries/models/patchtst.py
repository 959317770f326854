"""PatchTST: each series is cut into patches, which are the tokens; series do not see each other.

Source: arXiv 2211.14730; in details the time-series library's form, whose parameter names these are: layer
norms inside the layers, a batch norm after them, padding at the end only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import check_choices, check_positive, check_transformer
from manyheads.timeseries.models.embeddings import sinusoid
from manyheads.timeseries.models.exogenous import (
    NO_CHANNELS,
    Channels,
    LinearTerm,
    check_extras,
    split_outputs,
)
from manyheads.timeseries.models.inverted import AttentionLayer, EncoderLayer

_EPSILON = 1e-5  # added to the variance of a window


class PatchEmbedding(nn.Module):
    """Cut series into patches, after repeating their last value `stride` times, and embed each.

    Args:
        d_model: Width of a token.
        patch_len: Steps of a patch.
        stride: Steps from a patch to the next.
        patches: How many patches there are.
        dropout: Probability of dropping an element of a token.

    Shape:
        `[B, L]` -> `[B, patches, d_model]`.
    """

    pe: Tensor

    def __init__(self, d_model: int, patch_len: int, stride: int, patches: int, dropout: float) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(patch_len, d_model, bias=False)
        self.patch_len, self.stride, self.dropout = patch_len, stride, dropout
        # A formula, so not in the state dict: the library's checkpoints hold 5,000 rows of it.
        self.register_buffer("pe", sinusoid(patches, d_model), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed series."""
        padded = torch.cat([x, x[:, -1:].expand(-1, self.stride)], dim=1)
        tokens = self.value_embedding(padded.unfold(1, self.patch_len, self.stride)) + self.pe
        return dropout(tokens, self.dropout, self.training)


class ChannelNorm(nn.Module):
    """A batch norm of each channel, over batch and tokens.

    Its parameters are called `1.*`, as in the library, where it stands between two transpositions.

    Args:
        d_model: Width of a token.

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.add_module("1", nn.BatchNorm1d(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel."""
        return self.get_submodule("1")(x.flatten(0, 1)).view_as(x)


class Encoder(nn.Module):
    """Layers and a final norm.

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """

    def __init__(self, layers: list[EncoderLayer], d_model: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.norm = ChannelNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Encode tokens."""
        for layer in self.attn_layers:
            x = layer(x)
        return self.norm(x)


class Head(nn.Module):
    """All tokens of a series to its horizon; the weight's columns run over patches within features.

    Args:
        features: Elements of all tokens of a series.
        pred_len: Steps to forecast.
        dropout: Probability of dropping a step.

    Shape:
        `[B, patches, d_model]` -> `[B, pred_len]`.
    """

    def __init__(self, features: int, pred_len: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(features, pred_len)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map each series."""
        return dropout(self.linear(x.mT.flatten(1)), self.dropout, self.training)


class PatchTST(nn.Module):
    """Forecast every variate from its own history, with the same weights for all.

    Any number of variates will do.

    Args:
        patch_embedding: Makes the tokens.
        encoder: Mixes them.
        head: Makes the horizon of them.
        use_norm: Whether each window is standardised on the way in and restored on the way out.
        channels: The covariates that it takes.
        covariates: The term by which they enter.
        outputs: Numbers a step and variate.

    Shape:
        x `[B, L, N]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`, static `[B, Cs]` -> `[B, P, N]`, or
        `[B, P, N, K]` of several outputs.

    Source:
        arXiv 2211.14730.
    """

    def __init__(
        self,
        patch_embedding: PatchEmbedding,
        encoder: Encoder,
        head: Head,
        use_norm: bool = True,
        channels: Channels = NO_CHANNELS,
        covariates: LinearTerm | None = None,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.patch_embedding, self.encoder, self.head = patch_embedding, encoder, head
        self.use_norm, self.channels, self.outputs = use_norm, channels, outputs
        self.covariates = covariates

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Forecast; calendar features are ignored.

        Raises:
            ValueError: Not the covariates that the model is built for.
        """
        self.channels.check(past, future, static)
        x = x if self.covariates is None else self.covariates.explained(x, future)
        x = x.mT.contiguous()  # [B, N, L]
        if self.use_norm:
            var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)  # [B, N, 1]
            mean, std = mean.detach(), (var + _EPSILON).sqrt()  # the library stops the mean's gradient only
            x = (x - mean) / std
        tokens = self.encoder(self.patch_embedding(x.flatten(0, 1)))  # [B * N, patches, d_model]
        y = self.head(tokens).view(*x.shape[:2], -1)  # [B, N, P * K]
        y = split_outputs(y * std + mean if self.use_norm else y, self.outputs)
        return y if self.covariates is None else self.covariates(y, past, future, static)


def patchtst(
    seq_len: int,
    pred_len: int,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int = 2,
    d_ff: int = 2048,
    dropout: float = 0.1,
    activation: str = "gelu",
    patch_len: int = 16,
    stride: int = 8,
    use_norm: bool = True,
    past: int = 0,
    future: int = 0,
    static: int = 0,
    outputs: int = 1,
) -> PatchTST:
    """Build a PatchTST; the defaults are the time-series library's.

    Args:
        seq_len, pred_len: Steps of history, and to forecast.
        d_model, n_heads, e_layers, d_ff, dropout, activation: Sizes; "gelu" or "relu".
        patch_len: Steps of a patch.
        stride: Steps from a patch to the next.
        use_norm: Whether each window is standardised on the way in and restored on the way out.
        past, future, static: Covariates of each role; a linear term, the same for all variates.
        outputs: Numbers a step and variate; more than one needs use_norm=False.

    Raises:
        UsageError: An argument is not possible.
    """
    given = locals()
    sizes = ("seq_len", "pred_len", "d_model", "n_heads", "e_layers", "d_ff", "patch_len", "stride")
    check_positive("patchtst", given, sizes)
    check_choices("patchtst", given, {"activation": tuple(ACTIVATIONS)})
    check_transformer("patchtst", d_model, n_heads, dropout)
    if patch_len > seq_len:
        raise UsageError(f"patchtst: patch_len={patch_len} is longer than seq_len={seq_len}")
    channels = Channels(past, future, static)
    check_extras("patchtst", channels, outputs, use_norm)
    patches = (seq_len - patch_len) // stride + 2
    layers = [
        EncoderLayer(AttentionLayer(d_model, n_heads, dropout), d_model, d_ff, dropout, activation)
        for _ in range(e_layers)
    ]
    return PatchTST(
        PatchEmbedding(d_model, patch_len, stride, patches, dropout),
        Encoder(layers, d_model),
        Head(d_model * patches, pred_len * outputs, dropout),
        use_norm,
        channels,
        LinearTerm(channels, seq_len, pred_len, outputs) if channels else None,
        outputs,
    )
