"""How models that know targets alone are given covariates: as channels, as tokens or as a linear term.

In all of these `past` is known in the history, `future` in the history and the horizon, `static` is one value
a series; categories are embedded before. A module that is built for none has no parameter for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError


@dataclass(frozen=True)
class Channels:
    """How many covariates of each role a model is built for."""

    past: int = 0
    future: int = 0
    static: int = 0

    @property
    def total(self) -> int:
        """How many there are of all roles."""
        return self.past + self.future + self.static

    def __bool__(self) -> bool:
        return self.total > 0

    def check(self, past: Tensor | None, future: Tensor | None, static: Tensor | None) -> None:
        """Refuse covariates that are not those the model is built for.

        Raises:
            ValueError: The first role whose number is another.
        """
        for role, given in (("past", past), ("future", future), ("static", static)):
            wanted, there = getattr(self, role), 0 if given is None else given.shape[-1]
            if wanted != there:
                raise ValueError(f"this model is built for {wanted} {role} covariates, not {there}")


NO_CHANNELS = Channels()


def check_extras(model: str, channels: Channels, outputs: int, use_norm: bool) -> None:
    """Refuse negative numbers of covariates or outputs, and several outputs of a model that normalises.

    Raises:
        UsageError: Which of them, of which model.
    """
    for name, value in vars(channels).items():
        if not isinstance(value, int) or value < 0:
            raise UsageError(f"{model}: {name} must be the number of such covariates, not {value!r}")
    if not isinstance(outputs, int) or outputs < 1:
        raise UsageError(f"{model}: outputs must be a positive integer, not {outputs!r}")
    if outputs > 1 and use_norm:
        raise UsageError(f"{model}: outputs={outputs} needs use_norm=False: they are not all on one scale")


def split_outputs(y: Tensor, outputs: int) -> Tensor:
    """Lay out what a map from tokens to horizons gives.

    Shape:
        `[B, N, P * K]` -> `[B, P, N]` for one output, else `[B, P, N, K]`.
    """
    return y.mT if outputs == 1 else y.unflatten(-1, (-1, outputs)).transpose(1, 2)


def history_channels(x: Tensor, past: Tensor | None, future: Tensor | None, static: Tensor | None) -> Tensor:
    """Put covariates beside the history's values.

    Shape:
        x `[B, L, N]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`, static `[B, Cs]`; returns
        `[B, L, N + Cp + Cf + Cs]`.
    """
    length = x.shape[1]
    parts = [x] if past is None else [x, past]
    if future is not None:
        parts.append(future[:, :length])
    if static is not None:
        parts.append(static[:, None].expand(-1, length, -1))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else x


def decoder_channels(x: Tensor, future: Tensor | None) -> Tensor:
    """Put what is known of the horizon beside a decoder's input, whose steps are the last ones of `future`.

    Shape:
        x `[B, S, N]`, future `[B, L + P, Cf]` -> `[B, S, N + Cf]`.
    """
    return x if future is None else torch.cat([x, future[:, -x.shape[1] :]], dim=-1)


class CovariateTokens(nn.Module):
    """Covariates as tokens beside those of the variates.

    A history is embedded as a variate's is; the horizon of a future covariate adds a linear map of it, and a
    static one is a linear map of its value. As attention does not know a token by its place, each covariate
    has a trained vector as well.

    Args:
        channels: How many there are.
        pred_len: Steps to forecast.
        d_model: Width of a token.
    """

    def __init__(self, channels: Channels, pred_len: int, d_model: int) -> None:
        super().__init__()
        self.channels, self.pred_len = channels, pred_len
        over_time = channels.past + channels.future
        # The spread is that of an embedded history.
        self.names = nn.Parameter(torch.empty(over_time + channels.static, d_model).normal_(std=3**-0.5))
        self.horizon = nn.Linear(pred_len, d_model) if channels.future else None
        static = torch.empty(channels.static, d_model).normal_(std=3**-0.5)
        self.static = nn.Parameter(static) if channels.static else None

    def forward(
        self, embed: nn.Module, past: Tensor | None, future: Tensor | None, static: Tensor | None
    ) -> Tensor:
        """Make the tokens.

        Args:
            embed: Maps histories `[B, C, L]` to tokens `[B, C, d_model]`.

        Shape:
            past `[B, L, Cp]`, future `[B, L + P, Cf]`, static `[B, Cs]` -> `[B, Cp + Cf + Cs, d_model]`.
        """
        tokens = []
        if past is not None:
            tokens.append(embed(past.mT))
        if future is not None and self.horizon is not None:
            history, horizon = future.mT.tensor_split([future.shape[1] - self.pred_len], dim=-1)
            tokens.append(embed(history) + self.horizon(horizon))
        if static is not None and self.static is not None:
            tokens.append(static[..., None] * self.static)
        return torch.cat(tokens, dim=1) + self.names


class LinearTerm(nn.Module):
    """Covariates as a term that is added to each variate's forecast, the same for all variates.

    As in a regression with correlated errors, the effect of future covariates is first taken out of the
    history. The term begins as zero: the model is then the one without covariates.

    Args:
        channels: How many there are.
        seq_len: Steps of history.
        pred_len: Steps to forecast.
        outputs: Numbers a step and variate.
    """

    def __init__(self, channels: Channels, seq_len: int, pred_len: int, outputs: int) -> None:
        super().__init__()
        self.pred_len, self.outputs = pred_len, outputs
        self.known = _zero(channels.future, 1)
        self.horizon = _zero(channels.future, outputs)
        self.past = _zero(seq_len * channels.past, pred_len * outputs)
        self.static = _zero(channels.static, pred_len * outputs)

    def explained(self, x: Tensor, future: Tensor | None) -> Tensor:
        """Take what future covariates explain out of the history.

        Shape:
            x `[B, L, N]`, future `[B, L + P, Cf]` -> `[B, L, N]`.
        """
        if future is None or self.known is None:
            return x
        return x - self.known(future[:, : x.shape[1]])

    def forward(self, y: Tensor, past: Tensor | None, future: Tensor | None, static: Tensor | None) -> Tensor:
        """Add the term to a forecast.

        Shape:
            y `[B, P, N]`, or `[B, P, N, K]` of several outputs; past `[B, L, Cp]`, future `[B, L + P, Cf]`,
            static `[B, Cs]`.
        """
        term = y.new_zeros(len(y), self.pred_len, self.outputs)
        if future is not None and self.horizon is not None:
            term = term + self.horizon(future[:, -self.pred_len :])
        if past is not None and self.past is not None:
            term = term + self.past(past.flatten(1)).view_as(term)
        if static is not None and self.static is not None:
            term = term + self.static(static).view_as(term)
        return y + (term if y.dim() == 3 else term[:, :, None])


def _zero(inputs: int, outputs: int) -> nn.Linear | None:
    """A linear map that begins as zero; none where there is nothing to map."""
    if not inputs:
        return None
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear
