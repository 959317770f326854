"""How Informer and Autoformer embed a step: its values, its calendar, its position.

Source: Informer, arXiv 2012.07436, appendix B; Autoformer, arXiv 2106.13008, and the code of both.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.ops.dropout import dropout
from manyheads.timeseries.calendar import feature_names, split_freq

Embed = Literal["timeF", "fixed", "learned"]

_SIZES = {"minute": 4, "hour": 24, "weekday": 7, "day": 32, "month": 13}  # minutes by the quarter
# The first day of each month, counted from 0, in a common year and in a leap year.
_COMMON = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_MONTH_STARTS = sorted({first + leap for first in _COMMON for leap in (0, 1) if first > 31 or not leap})


def sinusoid(length: int, d_model: int) -> Tensor:
    """Return the sinusoid table of the first positions.

    Shape:
        `[length, d_model]`.
    """
    rates = (torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model)).exp()
    angles = torch.arange(length).float()[:, None] * rates  # [length, ceil(d_model / 2)]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]


class CircularConv(nn.Module):
    """A convolution of width three over channels-last series, whose end is followed by its beginning.

    The weight is `[out_features, in_features, 3]`, as this family's checkpoints have it.

    Args:
        in_features: Channels in.
        out_features: Channels out.
        bias: Whether a bias is added.
        padding: Steps of the other end that are put before and after the series; 2 lengthens it by two.

    Shape:
        `[B, L, in_features]` -> `[B, L + 2 * padding - 2, out_features]`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, padding: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, 3))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.padding = padding
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Conv1d` does, in the same order."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(3 * self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve over time."""
        out_features, in_features, _ = self.weight.shape
        length = x.shape[1] + 2 * self.padding - 2
        if in_features <= out_features:  # shift whichever side is the narrow one
            shifted = self._shifted(x, length)
            columns = torch.cat(shifted, dim=-1)  # [B, length, 3 * in]
            return F.linear(columns, self.weight.transpose(1, 2).flatten(1), self.bias)
        taps = F.linear(x, self.weight.permute(2, 0, 1).flatten(0, 1))  # [B, L, 3 * out]
        shifted = self._shifted(taps, length)
        before, here, after = (
            each.narrow(-1, tap * out_features, out_features) for tap, each in enumerate(shifted)
        )
        y = before + here + after  # [B, length, out]
        return y if self.bias is None else y + self.bias

    def _shifted(self, x: Tensor, length: int) -> list[Tensor]:
        """Return what stands before, at and after each step."""
        padded = torch.cat([x[:, -self.padding :], x, x[:, : self.padding]], dim=1)
        return [padded[:, tap : tap + length] for tap in range(3)]


class TokenEmbedding(nn.Module):
    """Embed the values of a step and of its two neighbours.

    Args:
        c_in: Variates.
        d_model: Width of a token.
        bias: Whether a bias is added: in Informer's own code it is, in what came after it is not.

    Shape:
        `[B, L, c_in]` -> `[B, L, d_model]`.
    """

    def __init__(self, c_in: int, d_model: int, bias: bool) -> None:
        super().__init__()
        self.tokenConv = CircularConv(c_in, d_model, bias)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embed each step.

        Raises:
            ValueError: The number of variates is not `c_in`.
        """
        c_in = self.tokenConv.weight.shape[1]
        if x.dim() != 3 or x.shape[-1] != c_in:
            raise ValueError(f"this model is built for [B, L, {c_in}] (enc_in), not {list(x.shape)}")
        return self.tokenConv(x)


class FeatureEmbedding(nn.Module):
    """Embed calendar features, numbers in [-0.5, 0.5], by a linear map ("timeF").

    Args:
        freq: Frequency of the steps; it says how many features there are.
        d_model: Width of a token.
        bias: Whether a bias is added.

    Shape:
        `[B, L, M]` -> `[B, L, d_model]`.
    """

    def __init__(self, freq: str, d_model: int, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(len(feature_names(freq)), d_model, bias)

    def marks(self, features: Tensor) -> Tensor:
        """Return what `forward` takes: the features themselves."""
        return features

    def forward(self, marks: Tensor) -> Tensor:
        """Embed each step's features.

        Raises:
            ValueError: Their number is another.
        """
        if marks.shape[-1] != self.embed.in_features:
            raise ValueError(
                f"this model is built for {self.embed.in_features} calendar features (freq), "
                f"not {marks.shape[-1]}"
            )
        return self.embed(marks)


class CalendarEmbedding(nn.Module):
    """Embed month, day, weekday, hour (and quarter of an hour), each by a table, and add up.

    Args:
        freq: Frequency of the steps, a day at most; steps of minutes have a table of quarters.
        d_model: Width of a token.
        learned: Whether the tables are trained; else they are sinusoids.

    Shape:
        marks, `[B, L, 4 or 5]` -> `[B, L, d_model]`.
    """

    def __init__(self, freq: str, d_model: int, learned: bool) -> None:
        super().__init__()
        self.features = feature_names(freq)
        minutes = split_freq(freq)[1] == "min"
        self.parts = ("month", "day", "weekday", "hour", *(("minute",) if minutes else ()))  # marks' order
        for part in self.parts:
            table = nn.Embedding(_SIZES[part], d_model) if learned else _Fixed(_SIZES[part], d_model)
            self.add_module(f"{part}_embed", table)

    def marks(self, features: Tensor) -> Tensor:
        """Return the calendar that `manyheads.timeseries.calendar`'s features stand for.

        Shape:
            features `[B, L, M]`; returns `[B, L, 4 or 5]`, int64: month and day from 1, weekday from 0
            (Monday), hour, quarter of an hour.

        Raises:
            ValueError: Not the number of features of this frequency.
        """
        if features.shape[-1] != len(self.features):
            raise ValueError(
                f"this model is built for {len(self.features)} calendar features (freq), "
                f"not {features.shape[-1]}"
            )
        of = dict(zip(self.features, (features.float() + 0.5).unbind(-1), strict=True))
        day = (of["day_of_month"] * 30).round().long()  # from 0
        first = (of["day_of_year"] * 365).round().long() - day  # of the month, in the year
        starts = torch.tensor(_MONTH_STARTS, device=features.device)
        found = torch.searchsorted(starts, first.contiguous())  # 0, 1, then two for each month
        month = torch.where(found < 2, found, (found + 2) // 2) + 1
        hour = of.get("hour_of_day", torch.zeros_like(of["day_of_month"])) * 23
        marks = [month, day + 1, (of["day_of_week"] * 6).round().long(), hour.round().long()]
        if "minute" in self.parts:
            marks.append((of["minute_of_hour"] * 59).round().long() // 15)
        return torch.stack(marks, dim=-1)

    def forward(self, marks: Tensor) -> Tensor:
        """Embed each step's calendar."""
        columns = marks.long().unbind(-1)
        embedded = [
            self.get_submodule(f"{part}_embed")(column)
            for part, column in zip(self.parts, columns, strict=True)
        ]
        return torch.stack(embedded).sum(0)


class _Fixed(nn.Module):
    """A frozen table of sinusoids."""

    def __init__(self, size: int, d_model: int) -> None:
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(sinusoid(size, d_model), freeze=True)

    def forward(self, index: Tensor) -> Tensor:
        return self.emb(index)


class DataEmbedding(nn.Module):
    """Add up the embeddings of a step's values, of its calendar and, for Informer, of its position.

    Args:
        c_in: Variates.
        d_model: Width of a token.
        temporal: Embeds the calendar.
        dropout: Probability of dropping an element of a token.
        bias: Whether the values' embedding has a bias.
        positions: How many positions there are; 0 leaves them out.

    Shape:
        x `[B, L, c_in]`, marks `[B, L, M]` -> `[B, L, d_model]`.
    """

    pe: Tensor

    def __init__(
        self,
        c_in: int,
        d_model: int,
        temporal: FeatureEmbedding | CalendarEmbedding,
        dropout: float,
        bias: bool,
        positions: int,
    ) -> None:
        super().__init__()
        self.value_embedding = TokenEmbedding(c_in, d_model, bias)
        self.temporal_embedding = temporal
        self.dropout, self.variates = dropout, c_in
        # A formula, so not in the state dict: official checkpoints hold 5,000 rows of it, used or not.
        self.register_buffer("pe", sinusoid(positions, d_model), persistent=False)

    def forward(self, x: Tensor, marks: Tensor | None) -> Tensor:
        """Embed each step; without marks its calendar is left out.

        Raises:
            ValueError: Not the variates, calendar features or lengths that the model is built for.
        """
        if marks is not None and marks.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"calendar features {list(marks.shape)} are not those of {list(x.shape)}")
        if 0 < len(self.pe) < x.shape[1]:
            raise ValueError(f"{x.shape[1]} steps are more than the {len(self.pe)} the model is built for")
        tokens = self.value_embedding(x)
        if marks is not None:
            tokens = tokens + self.temporal_embedding(marks)
        if len(self.pe):
            tokens = tokens + self.pe[: x.shape[1]]
        return dropout(tokens, self.dropout, self.training)


def temporal_embedding(
    embed: str, freq: str, d_model: int, bias: bool
) -> FeatureEmbedding | CalendarEmbedding:
    """Build the calendar's embedding.

    Args:
        embed: "timeF" (linear in the features), "fixed" (tables of sinusoids) or "learned" (trained tables).
        freq: Frequency of the steps, as in the data: "h", "15min", "D", "ME", ...
        d_model: Width of a token.
        bias: Whether "timeF" has a bias.

    Raises:
        UsageError: No such embedding or frequency, or tables for steps longer than a day.
    """
    if embed not in get_args(Embed):
        raise UsageError(f"no calendar embedding {embed!r} ({', '.join(get_args(Embed))})")
    try:
        names = feature_names(freq)
    except DataError as error:
        raise UsageError(str(error)) from None
    if embed == "timeF":
        return FeatureEmbedding(freq, d_model, bias)
    if "day_of_week" not in names:
        raise UsageError(f'embed="{embed}" knows days and hours, and freq={freq!r} is longer; use "timeF"')
    return CalendarEmbedding(freq, d_model, learned=embed == "learned")
