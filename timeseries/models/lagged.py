"""What the transformers library's forecasters are given and give: scaled lags in, a distribution out.

A token is made of the series' values at some lags, of calendar and known covariates, and of what is constant
in the window: static covariates, and the logarithms of the loc and scale by which the window is normalised.

Source: the transformers library's InformerForPrediction and AutoformerForPrediction, which took this frame
from GluonTS (arXiv 1906.05264).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.distributions import DISTRIBUTIONS, Distribution, NegativeBinomial
from manyheads.timeseries.models.attention import ACTIVATIONS
from manyheads.timeseries.models.blocks import check_choices, check_marks, check_positive, check_transformer
from manyheads.timeseries.models.lagged_attention import COMPAT
from manyheads.timeseries.windows import Batch, fill_gaps

SCALINGS = ("mean", "std", "none")


class History(NamedTuple):
    """What is known when a forecast is made; T is the context's length and the longest lag."""

    values: Tensor  # [B, T, N], without NaN
    observed: Tensor  # [B, T, N], 1 where a value was observed, else 0
    time: Tensor  # [B, context + P, F], calendar and known covariates of the context and the horizon
    static: Tensor | None = None  # [B, R], numbers
    categories: Tensor | None = None  # [B, K], int64


class Target(NamedTuple):
    """What came after."""

    values: Tensor  # [B, P, N], without NaN
    observed: Tensor  # [B, P, N], 1 where a value counts, else 0


class Scaled(NamedTuple):
    """A history as the network sees it."""

    values: Tensor  # [B, T, N], normalised
    loc: Tensor  # [B, 1, N]
    scale: Tensor  # [B, 1, N]
    static: Tensor  # [B, S], all that is constant in the window
    features: Tensor  # [B, context + P, S + F]

    def repeat(self, copies: int) -> Scaled:
        """Take every sample several times in a row."""
        return Scaled(*(each.repeat_interleave(copies, dim=0) for each in self))


@dataclass(frozen=True)
class Frame:
    """The sizes of a window.

    Args:
        seq_len: Steps of history: the context and the longest lag.
        pred_len: Steps to forecast.
        variates: How many series are forecast together.
        lags: How many steps before each step a token looks.
        marks: Calendar features.
        future: Known covariates, numbers.
        static: Static covariates, numbers.
        static_categories: Values of each categorical one.
        embedding_dims: Widths of their embeddings.
        scaling: By what a window is normalised: "mean" of the absolute values, "std" (and mean), "none".
        compat: See `informer_lagged`.
    """

    seq_len: int
    pred_len: int
    variates: int
    lags: tuple[int, ...]
    marks: int
    future: int
    static: int
    static_categories: tuple[int, ...]
    embedding_dims: tuple[int, ...]
    scaling: str
    compat: str

    @property
    def context(self) -> int:
        """Steps that the encoder reads."""
        return self.seq_len - max(self.lags)

    @property
    def constants(self) -> int:
        """How many features are constant in a window."""
        return sum(self.embedding_dims) + self.static + 2 * self.variates

    @property
    def features(self) -> int:
        """How many features a token is made of."""
        return self.variates * len(self.lags) + self.constants + self.marks + self.future

    @classmethod
    def of(cls, model: str, given: Mapping[str, Any]) -> Frame:
        """Take the sizes out of a builder's arguments.

        Raises:
            UsageError: They make no window.
        """
        categories = tuple(given["static_categories"] or ())
        widths = given["embedding_dims"]
        try:
            marks = (
                len(feature_names(given["freq"]))
                if given["time_features"] is None
                else given["time_features"]
            )
        except DataError as error:
            raise UsageError(f"{model}: {error}") from None
        frame = cls(
            given["seq_len"],
            given["pred_len"],
            given["enc_in"],
            _read_lags(given["lags"]),
            marks,
            given["future"],
            given["static"],
            categories,
            tuple(min(50, (each + 1) // 2) for each in categories) if widths is None else tuple(widths),
            given["scaling"],
            given["compat"],
        )
        frame.check(model)
        return frame

    def check(self, model: str) -> None:
        """Refuse sizes that make no window.

        Raises:
            UsageError: Which of them, of which model.
        """
        check_choices(model, vars(self), {"scaling": SCALINGS, "compat": COMPAT})
        if not self.lags or any(type(lag) is not int or lag < 1 for lag in self.lags):
            raise UsageError(f"{model}: lags must be steps back, 1 or more each, not {list(self.lags)}")
        if self.context < 1:
            raise UsageError(
                f"{model}: seq_len={self.seq_len} leaves no context before the lag {max(self.lags)}"
            )
        for name, columns in (
            ("time_features", self.marks),
            ("future", self.future),
            ("static", self.static),
        ):
            if type(columns) is not int or columns < 0:
                raise UsageError(f"{model}: {name} must be a number of columns, not {columns!r}")
        for name in ("static_categories", "embedding_dims"):
            if any(type(each) is not int or each < 1 for each in getattr(self, name)):
                raise UsageError(
                    f"{model}: {name} must be positive integers, not {list(getattr(self, name))}"
                )
        if len(self.static_categories) != len(self.embedding_dims):
            raise UsageError(
                f"{model}: {len(self.embedding_dims)} embedding_dims for "
                f"{len(self.static_categories)} static_categories"
            )


def _read_lags(lags: str | Sequence[int] | None) -> tuple[int, ...]:
    if isinstance(lags, str):  # what is no number is refused with the others
        return tuple(int(each) if each.strip().isdecimal() else 0 for each in lags.split(","))
    return tuple(range(1, 8) if lags is None else lags)


def scale_window(values: Tensor, observed: Tensor, scaling: str, shared: bool) -> tuple[Tensor, Tensor]:
    """Return the loc and scale of windows.

    Args:
        values: The context.
        observed: 1 where a value was observed, else 0.
        scaling: "mean", "std" or "none".
        shared: Whether a series without any observation has the mean scale of its batch, as in the library;
            else it has 1, so that no series depends on another.

    Shape:
        `[B, L, N]` twice -> `[B, 1, N]` twice.
    """
    count = observed.sum(1, keepdim=True)
    if scaling == "none":
        scale = torch.ones_like(values[:, :1])
        return torch.zeros_like(scale), scale
    if scaling == "std":
        count = count.clamp_min(1)
        loc = (values * observed).sum(1, keepdim=True) / count
        variance = ((values - loc) * observed).square().sum(1, keepdim=True) / count
        return loc, (variance + 1e-5).sqrt()
    total = (values * observed).abs().sum(1, keepdim=True)
    unseen = total.sum(0) / count.sum(0).clamp_min(1) if shared else torch.ones_like(total)
    scale = torch.where(count > 0, total / count.clamp_min(1), unseen).clamp_min(1e-10)
    return torch.zeros_like(scale), scale


def lagged(sequence: Tensor, lags: Sequence[int], first: int, count: int) -> Tensor:
    """Return the values before each of `count` steps from the step `first` on.

    Shape:
        `[B, T, N]` -> `[B, count, N * lags]`, the lags of a variate side by side.
    """
    parts = [sequence[:, first - lag : first - lag + count] for lag in lags]
    return torch.stack(parts, dim=-1).flatten(2)


class Window(nn.Module):
    """Turns batches into histories, and histories into what the network sees.

    Args:
        frame: The sizes.
    """

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        pairs = zip(frame.static_categories, frame.embedding_dims, strict=True)
        self.embedders = nn.ModuleList(nn.Embedding(values, width) for values, width in pairs)

    def batch(self, x: Tensor, x_mark: Tensor | None, y_mark: Tensor | None) -> Batch:
        """Make a batch of a history alone."""
        check_marks(x_mark, y_mark)
        ahead = x.new_full((x.shape[0], self.frame.pred_len, x.shape[-1]), torch.nan)
        none = (x[..., :0], ahead[..., :0])
        x_mark, y_mark = none if x_mark is None or y_mark is None else (x_mark, y_mark)
        return {"x": x, "y": ahead, "x_mark": x_mark, "y_mark": y_mark}

    def history(self, batch: Batch) -> History:
        """Take what is known out of a batch.

        Raises:
            ValueError: A shape is not the model's.
            UsageError: There are covariates that the model cannot use.
            DataError: A category is none of those the model knows.
        """
        frame, x = self.frame, batch["x"]
        if x.shape[1:] != (frame.seq_len, frame.variates):
            raise ValueError(
                f"this model is built for [B, {frame.seq_len}, {frame.variates}], not {list(x.shape)}"
            )
        if "past" in batch:
            raise UsageError("this model takes no covariates that are known in the history alone")
        time = [batch["x_mark"][:, -frame.context :], batch["y_mark"]]
        known = batch["future"][:, -frame.context - frame.pred_len :] if "future" in batch else None
        _check_columns("calendar features (freq)", time[0], frame.marks)
        _check_columns("future covariates", known, frame.future)
        features = torch.cat(time, dim=1)
        features = features if known is None else torch.cat([features, known], dim=-1)
        observed = batch["observed"].to(x.dtype) if "observed" in batch else torch.ones_like(x)
        static, categories = self._static(batch)
        return History(x, observed, features, static, categories)

    def _static(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        numbers, codes = self.frame.static, len(self.embedders)
        given = batch.get("static")
        _check_columns("static covariates", given, numbers + codes)
        if given is None:
            return None, None
        return given[:, :numbers] if numbers else None, given[:, numbers:].long() if codes else None

    def target(self, batch: Batch) -> Target:
        """Take what came after out of a batch; gaps are filled, and do not count."""
        observed = ~batch["y"].isnan()
        filled = fill_gaps(torch.cat([batch["x"], batch["y"]], dim=1))[:, batch["x"].shape[1] :]
        return Target(filled, observed.to(filled.dtype))

    def forward(self, history: History) -> Scaled:
        """Normalise a window, and gather its features.

        Raises:
            DataError: A category is none of those the model knows.
        """
        frame, context = self.frame, self.frame.context
        values, observed = history.values, history.observed
        shared = frame.compat == "transformers"
        loc, scale = scale_window(values[:, -context:], observed[:, -context:], frame.scaling, shared)
        constants = [loc.squeeze(1).abs().log1p(), scale.squeeze(1).log()]
        if history.static is not None:
            constants.insert(0, history.static)
        if history.categories is not None:
            constants = [*self._embed(history.categories), *constants]
        static = torch.cat(constants, dim=1)
        steps = static[:, None].expand(-1, history.time.shape[1], -1)
        return Scaled((values - loc) / scale, loc, scale, static, torch.cat([steps, history.time], dim=-1))

    def _embed(self, categories: Tensor) -> list[Tensor]:
        for i, values in enumerate(self.frame.static_categories):
            column = categories[:, i]
            if bool(((column < 0) | (column >= values)).any()):
                worst = int(column[(column < 0) | (column >= values)][0])
                raise DataError(f"static category {worst} of column {i} is not one of 0 to {values - 1}")
        return [embed(categories[:, i]) for i, embed in enumerate(self.embedders)]


def _check_columns(what: str, given: Tensor | None, wanted: int) -> None:
    there = 0 if given is None else given.shape[-1]
    if there != wanted:
        raise ValueError(f"this model is built for {wanted} {what}, not {there}")


class ParameterProjection(nn.Module):
    """The distribution head: a linear map to each parameter.

    Args:
        width: Features in.
        variates: How many values each step has.
        output: The distribution's name.

    Shape:
        `[B, P, width]` -> a distribution of `[B, P, N]`.
    """

    def __init__(self, width: int, variates: int, output: str) -> None:
        super().__init__()
        self.distribution = DISTRIBUTIONS[output]
        self.proj = nn.ModuleList(nn.Linear(width, variates) for _ in range(self.distribution.size))

    def forward(self, x: Tensor, scaled: Scaled) -> Distribution:
        """Return the distribution of the values, in their own units."""
        raw = torch.stack([project(x) for project in self.proj], dim=-1)
        if self.distribution is NegativeBinomial:  # counts are scaled, never shifted
            return self.distribution.of(raw, None, scaled.scale)
        return self.distribution.of(raw, scaled.loc, scaled.scale)


def negative_log_likelihood(distribution: Distribution, target: Target) -> Tensor:
    """Return the mean over steps; one counts where all its variates were observed.

    Raises:
        DataError: A count is negative or no whole number.
    """
    values = target.values
    if isinstance(distribution, NegativeBinomial):
        counted = values[target.observed > 0]
        if bool(((counted < 0) | (counted != counted.round())).any()):
            raise DataError(
                "negative_binomial forecasts counts, 0, 1, 2, ..., and the targets are others; "
                "train with scaling none, or with another distribution"
            )
    weights = target.observed.amin(-1)
    log_prob = distribution.log_prob(values).sum(-1)  # the variates are independent
    kept = torch.where(weights != 0, log_prob * weights, 0)
    return -kept.sum() / weights.sum().clamp_min(1)


def check_sizes(model: str, given: Mapping[str, Any]) -> None:
    """Refuse what both models' builders cannot build.

    Raises:
        UsageError: Which argument, of which model.
    """
    positive = (
        "seq_len",
        "pred_len",
        "enc_in",
        "factor",
        "d_model",
        "e_layers",
        "d_layers",
        "d_ff",
        "dec_ff",
    )
    check_positive(model, given, (*positive, "n_heads", "dec_heads", "num_samples"))
    check_choices(model, given, {"activation": tuple(ACTIVATIONS), "output": tuple(DISTRIBUTIONS)})
    for heads in (given["n_heads"], given["dec_heads"]):
        check_transformer(model, given["d_model"], heads, given["dropout"])
    for name in ("attention_dropout", "activation_dropout", "enc_layerdrop", "dec_layerdrop"):
        if not 0 <= given[name] < 1:
            raise UsageError(f"{model}: {name} must be in [0, 1), not {given[name]}")
