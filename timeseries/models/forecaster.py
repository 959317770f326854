"""Forecasters with covariates: any base model, with scaled windows and an output of any kind around it.

Source: windows are standardised as in arXiv 2310.06625, or divided by their mean size as in arXiv 1704.04110;
both with the observed values alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from manyheads.core import catalog
from manyheads.core.errors import UsageError
from manyheads.timeseries.calls import Forecast, Probabilistic
from manyheads.timeseries.heads import Head, make_head
from manyheads.timeseries.models.blocks import check_choices
from manyheads.timeseries.windows import Batch

Plain: TypeAlias = bool | int | float | str | None

SCALINGS = ("standard", "mean", "none")
_EPSILON = 1e-5  # added to the variance of a window
_ROLES = ("past", "future", "static")


class CategoryEmbedding(nn.Module):
    """Numbers as they are, and categories by tables, side by side.

    A table of k codes is min(50, (k + 1) // 2) wide. Code 0, of what is missing or was never seen, is zeros.

    Args:
        numeric: Columns of numbers, which come first.
        codes: How many codes each further column has.

    Shape:
        `[..., numeric + len(codes)]` -> `[..., channels]`.
    """

    def __init__(self, numeric: int, codes: Sequence[int]) -> None:
        super().__init__()
        self.numeric = numeric
        self.tables = nn.ModuleList(nn.Embedding(k, min(50, (k + 1) // 2), padding_idx=0) for k in codes)
        self.channels = numeric + sum(min(50, (k + 1) // 2) for k in codes)

    def forward(self, values: Tensor) -> Tensor:
        """Embed each row."""
        if not self.tables:
            return values
        codes = values[..., self.numeric :].long().unbind(-1)
        embedded = [table(column) for table, column in zip(self.tables, codes, strict=True)]
        return torch.cat([values[..., : self.numeric], *embedded], dim=-1)


def window_statistics(
    x: Tensor, observed: Tensor | None, scaling: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return what windows are shifted and divided by; None for nothing.

    Args:
        observed: Where x was observed; None for everywhere.
        scaling: "standard", "mean" (divided by the mean absolute value alone) or "none".

    Shape:
        x, observed `[B, L, N]` -> two of `[B, 1, N]`; a window of which nothing is known has 0 and 1.
    """
    if scaling == "none":
        return None, None
    weight = torch.ones_like(x) if observed is None else observed.to(x.dtype)
    count = weight.sum(1, keepdim=True)
    weight = weight / count.clamp(min=1)
    if scaling == "mean":
        scale = (x.abs() * weight).sum(1, keepdim=True)
        return None, torch.where(scale > 0, scale, 1.0)
    loc = (x * weight).sum(1, keepdim=True)
    var = ((x - loc).square() * weight).sum(1, keepdim=True)
    return loc, torch.where(count > 0, (var + _EPSILON).sqrt(), 1.0)


class WindowForecaster(nn.Module):
    """Embed categories, scale windows, ask a base model, and read its outputs by a head.

    Args:
        base: Takes `x, x_mark, y_mark` and the covariates that there are by name; gives `[B, P, N]`, or
            `[B, P, N, K]` of several outputs.
        head: Reads the K outputs.
        past: Embeds the past covariates.
        future: Embeds the future covariates.
        static: Embeds the static covariates.
        scaling: One of `SCALINGS`.
    """

    def __init__(
        self,
        base: nn.Module,
        head: Head,
        past: CategoryEmbedding,
        future: CategoryEmbedding,
        static: CategoryEmbedding,
        scaling: str,
    ) -> None:
        super().__init__()
        self.base, self.head, self.scaling = base, head, scaling
        self.embeddings = nn.ModuleDict({"past": past, "future": future, "static": static})

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The quantiles that it has; None for any."""
        return self.head.levels

    @property
    def variates(self) -> int | None:
        """How many variates it takes; None for any number."""
        return getattr(self.base, "variates", None)

    def forward(
        self,
        x: Tensor,
        x_mark: Tensor | None = None,
        y_mark: Tensor | None = None,
        past: Tensor | None = None,
        future: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Return the point forecast.

        Shape:
            x `[B, L, N]`, x_mark `[B, L, M]`, y_mark `[B, P, M]`, past `[B, L, Cp]`, future `[B, L + P, Cf]`,
            static `[B, Cs]`, with categories as codes -> `[B, P, N]`.
        """
        raw = self._raw(x, x_mark, y_mark, None, {"past": past, "future": future, "static": static})
        return self.head.forecast(*raw, ()).point

    def predict(self, batch: Batch, levels: Sequence[float] = ()) -> Forecast:
        """Forecast a batch, with quantiles of some levels that the head has.

        Raises:
            ValueError: Not the covariates that the model is built for.
        """
        return self.head.forecast(*self._of(batch), levels)

    def loss(self, batch: Batch) -> Tensor:
        """Return the head's mean loss over the targets that are not NaN."""
        raw, loc, scale = self._of(batch)
        return self.head.loss(raw, batch["y"], loc, scale)

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ask the base model about a batch."""
        given = {"past": batch.get("past"), "future": batch.get("future"), "static": batch.get("static")}
        return self._raw(batch["x"], batch["x_mark"], batch["y_mark"], batch.get("observed"), given)

    def _raw(
        self,
        x: Tensor,
        x_mark: Tensor | None,
        y_mark: Tensor | None,
        observed: Tensor | None,
        covariates: Mapping[str, Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return raw outputs `[B, P, N, K]`, and what the windows were shifted and divided by."""
        loc, scale = window_statistics(x, observed, self.scaling)
        z = x if loc is None else x - loc
        z = z if scale is None else z / scale
        raw = self.base(z, x_mark, y_mark, **self._embedded(covariates))
        return raw[..., None] if self.head.outputs == 1 else raw, loc, scale

    def _embedded(self, covariates: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Embed the covariates that there are, and refuse what the model is not built for."""
        found = {}
        for role, embed in self.embeddings.items():
            assert isinstance(embed, CategoryEmbedding)
            given = covariates[role]
            wanted, there = embed.numeric + len(embed.tables), 0 if given is None else given.shape[-1]
            if wanted != there:
                raise ValueError(f"this model is built for {wanted} {role} covariates, not {there}")
            if given is not None and wanted:
                found[role] = embed(given)
        return found


def forecaster(
    base: str,
    seq_len: int,
    pred_len: int,
    arguments: Mapping[str, Plain] | None = None,
    past: int = 0,
    past_categories: Sequence[int] = (),
    future: int = 0,
    future_categories: Sequence[int] = (),
    static: int = 0,
    static_categories: Sequence[int] = (),
    output: str = "point",
    quantiles: Sequence[float] | None = None,
    window_scaling: str | None = None,
) -> WindowForecaster:
    """Build a base model of the catalogue with covariates and an output of any kind around it.

    Args:
        base: The base model's catalogue name.
        seq_len, pred_len: Steps of history, and to forecast.
        arguments: The base model's other options.
        past, future, static: Numeric covariates of each role.
        past_categories, future_categories, static_categories: For each categorical one how many codes it has.
        output: "point", "quantile", "student_t", "normal" or "negative_binomial".
        quantiles: Levels of output quantile, rising.
        window_scaling: "standard", "mean" or "none"; None takes "standard", and "mean" for negative_binomial.

    Raises:
        UsageError: An argument is not possible, or not with this base model.

    Example:
        >>> forecaster("dlinear", 96, 24, output="quantile", quantiles=[0.1, 0.5, 0.9]).levels
        (0.1, 0.5, 0.9)
    """
    head = make_head(output, quantiles)
    scaling = window_scaling or ("mean" if output == "negative_binomial" else "standard")
    check_choices("forecaster", {"window_scaling": scaling}, {"window_scaling": SCALINGS})
    if output == "negative_binomial" and scaling == "standard":
        raise UsageError('negative_binomial forecasts counts, which window_scaling "standard" would shift')
    numbers = {"past": past, "future": future, "static": static}
    codes = {"past": past_categories, "future": future_categories, "static": static_categories}
    embeddings = {role: CategoryEmbedding(numbers[role], codes[role]) for role in _ROLES}
    channels = {role: embed.channels for role, embed in embeddings.items() if embed.channels}
    more = _base_arguments(base, dict(arguments or {}), channels, head.outputs, scaling)
    made = catalog.create_model(base, seq_len=seq_len, pred_len=pred_len, **more)
    if isinstance(made, Probabilistic):
        raise UsageError(f"{base} has an output and covariates of its own; train it as it is")
    return WindowForecaster(made, head, **embeddings, scaling=scaling)


def _base_arguments(
    base: str, arguments: dict[str, Plain], channels: Mapping[str, int], outputs: int, scaling: str
) -> dict[str, Plain]:
    """Return a base model's options, with what the wrapper asks of it."""
    if catalog.find(base).task != "forecast" or base == "forecaster":
        raise UsageError(f"{base} is no base model of a forecaster")
    known = inspect.signature(catalog.builder(catalog.find(base))).parameters
    for role in channels:
        if role not in known:
            raise UsageError(f"{base} takes no {role} covariates")
    if outputs > 1 and "outputs" not in known:
        raise UsageError(f"{base} forecasts points only; intervals around them: conformal")
    ours = {"seq_len", "pred_len", "outputs", *_ROLES} & set(arguments)
    if ours:
        raise UsageError(f"{sorted(ours)[0]} is no option of the base model here, but of what is around it")
    if "use_norm" in known:
        if arguments.get("use_norm", scaling == "standard") is not (scaling == "standard"):
            raise UsageError(
                f'use_norm={arguments["use_norm"]} contradicts window_scaling "{scaling}"; give one of them'
            )
        arguments["use_norm"] = False  # done here, for all outputs alike
    return {**arguments, **channels, **({"outputs": outputs} if outputs > 1 else {})}
