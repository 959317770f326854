"""Distributions of a value to come, made of a network's raw outputs.

The maps from raw outputs to parameters are those of the transformers library's forecasters, so that weights
trained there mean the same here. Densities and quantiles are computed in double precision: the differences of
log-gammas of which they consist lose all digits of single precision where a parameter is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.timeseries.special import betainc, student_t_quantile

_MOST_COUNTS = 2.0**52  # beyond, doubles do not tell whole numbers apart


def squareplus(x: Tensor) -> Tensor:
    """Return (x + sqrt(x² + 4)) / 2, which is positive, without cancellation where x is very negative."""
    above, below = x.clamp_min(0), x.clamp_max(0)
    two = x.new_tensor(2.0)
    return torch.where(
        x >= 0,
        (above + torch.hypot(above, two)) / 2,
        2 / (torch.hypot(below, two) - below),
    )


def _positive(x: Tensor) -> Tensor:
    return squareplus(x).clamp_min(torch.finfo(x.dtype).eps)


def _levels(levels: Sequence[float]) -> tuple[float, ...]:
    wrong = [level for level in levels if not 0 < level < 1]
    if wrong:
        raise ValueError(f"quantile levels lie between 0 and 1, not {wrong[0]}")
    return tuple(float(level) for level in levels)


@dataclass(frozen=True)
class StudentT:
    """Student's t distribution; also of values that were normalised with a loc and a scale."""

    size: ClassVar[int] = 3
    names: ClassVar[tuple[str, ...]] = ("df", "loc", "scale")
    df: Tensor
    loc: Tensor
    scale: Tensor

    @staticmethod
    def parameters(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map raw outputs `[..., 3]` to degrees of freedom (above 2), loc and scale (above 0)."""
        df, loc, scale = raw.unbind(-1)
        return 2 + squareplus(df), loc, _positive(scale)

    @classmethod
    def of(cls, raw: Tensor, loc: Tensor | None = None, scale: Tensor | None = None) -> StudentT:
        """Make it of raw outputs, for values that are the network's times `scale` plus `loc`."""
        df, own_loc, own_scale = cls.parameters(raw)
        return cls(df, *_affine(own_loc, own_scale, loc, scale))

    @property
    def mean(self) -> Tensor:
        """Return the mean."""
        return self.loc

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the logarithm of the density at y."""
        df, scale = self.df.double(), self.scale.double()
        z = (y.double() - self.loc.double()) / scale
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2 - scale.log()
        return (constant - (df + 1) / 2 * torch.log1p(z * z / df)).to(y.dtype)

    def quantile(self, levels: Sequence[float]) -> Tensor:
        """Return quantiles `[..., Q]`."""
        return StudentT(self.df[..., None], self.loc[..., None], self.scale[..., None]).at(levels)

    def at(self, levels: Sequence[float]) -> Tensor:
        """Return the quantiles of parameters `[..., Q]`, each at its own level."""
        standard = student_t_quantile(self.df, _levels(levels))
        return (self.loc.double() + self.scale.double() * standard).to(self.loc.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `[n, ...]`; with one draw, in the order in which torch.distributions draws."""
        df, loc, scale = (
            each.detach().expand(n, *self.loc.shape) for each in (self.df, self.loc, self.scale)
        )
        normal = torch.empty_like(loc, memory_format=torch.contiguous_format).normal_(generator=generator)
        tiny = torch.finfo(df.dtype).tiny
        chi_square = (2 * torch._standard_gamma((df / 2).contiguous(), generator=generator)).clamp_min(tiny)
        return loc + scale * (normal * torch.rsqrt(chi_square / df))


@dataclass(frozen=True)
class Normal:
    """The normal distribution; also of values that were normalised with a loc and a scale."""

    size: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("loc", "scale")
    loc: Tensor
    scale: Tensor

    @staticmethod
    def parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
        """Map raw outputs `[..., 2]` to loc and scale (above 0)."""
        loc, scale = raw.unbind(-1)
        return loc, _positive(scale)

    @classmethod
    def of(cls, raw: Tensor, loc: Tensor | None = None, scale: Tensor | None = None) -> Normal:
        """Make it of raw outputs, for values that are the network's times `scale` plus `loc`."""
        return cls(*_affine(*cls.parameters(raw), loc, scale))

    @property
    def mean(self) -> Tensor:
        """Return the mean."""
        return self.loc

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the logarithm of the density at y."""
        scale = self.scale.double()
        z = (y.double() - self.loc.double()) / scale
        return (-z * z / 2 - scale.log() - math.log(2 * math.pi) / 2).to(y.dtype)

    def quantile(self, levels: Sequence[float]) -> Tensor:
        """Return quantiles `[..., Q]`."""
        return Normal(self.loc[..., None], self.scale[..., None]).at(levels)

    def at(self, levels: Sequence[float]) -> Tensor:
        """Return the quantiles of parameters `[..., Q]`, each at its own level."""
        probabilities = torch.tensor(_levels(levels), dtype=torch.float64, device=self.loc.device)
        standard = torch.special.ndtri(probabilities)
        return (self.loc.double() + self.scale.double() * standard).to(self.loc.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `[n, ...]`; with one draw, in the order in which torch.distributions draws."""
        loc, scale = (each.detach().expand(n, *self.loc.shape) for each in (self.loc, self.scale))
        return torch.normal(loc, scale, generator=generator)


@dataclass(frozen=True)
class NegativeBinomial:
    """The negative binomial distribution of counts 0, 1, 2, ..., with any positive `total_count`.

    Its mean is `total_count * exp(logits)`. Counts can be scaled, by way of the logits, but not shifted.
    """

    size: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("total_count", "logits")
    total_count: Tensor
    logits: Tensor

    @staticmethod
    def parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
        """Map raw outputs `[..., 2]` to total_count (above 0) and logits."""
        total_count, logits = raw.unbind(-1)
        return squareplus(total_count), logits

    @classmethod
    def of(cls, raw: Tensor, loc: Tensor | None = None, scale: Tensor | None = None) -> NegativeBinomial:
        """Make it of raw outputs, for counts whose mean is the network's times `scale`.

        Raises:
            ValueError: There is a `loc`: counts are not shifted.
        """
        if loc is not None:
            raise ValueError("counts of a negative binomial distribution can be scaled, not shifted")
        total_count, logits = cls.parameters(raw)
        return cls(total_count, logits if scale is None else logits + scale.log())

    @property
    def mean(self) -> Tensor:
        """Return the mean."""
        return self.total_count * self.logits.exp()

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the logarithm of the probability of the count y."""
        n, logits, k = self.total_count.double(), self.logits.double(), y.double()
        ways = torch.lgamma(n + k) - torch.lgamma(k + 1) - torch.lgamma(n)
        each = torch.nn.functional.logsigmoid
        return (ways + n * each(-logits) + k * each(logits)).to(y.dtype)

    def quantile(self, levels: Sequence[float]) -> Tensor:
        """Return quantiles `[..., Q]`: the smallest count that is not exceeded with that probability."""
        return NegativeBinomial(self.total_count[..., None], self.logits[..., None]).at(levels)

    def at(self, levels: Sequence[float]) -> Tensor:
        """Return the quantiles of parameters `[..., Q]`, each at its own level."""
        wanted = torch.tensor(_levels(levels), dtype=torch.float64, device=self.logits.device)
        n, logits, wanted = torch.broadcast_tensors(self.total_count.double(), self.logits.double(), wanted)
        # No relative error of the distribution function below this one may move an exact tie up.
        found = _smallest_counts(n.flatten(), logits.flatten(), wanted.flatten() * (1 - 1e-12))
        return found.view(n.shape).to(self.logits.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `[n, ...]`; with one draw, in the order in which torch.distributions draws."""
        shape = (n, *self.logits.shape)
        count, logits = (each.detach().expand(shape) for each in (self.total_count, self.logits))
        rate = torch._standard_gamma(count.contiguous(), generator=generator) * logits.exp()
        return torch.poisson(rate, generator=generator)


def _smallest_counts(n: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the smallest counts whose probability not to be exceeded is the wanted one at least.

    Shape:
        All `[K]`.
    """
    fail, succeed = torch.sigmoid(-logits), torch.sigmoid(logits)

    def below(counts: Tensor, rows: Tensor) -> Tensor:
        return betainc(n[rows], counts + 1, fail[rows], succeed[rows]) < wanted[rows]

    low = torch.full_like(n, -1)
    high = (n * logits.exp()).ceil().clamp(1, _MOST_COUNTS)
    rows = torch.arange(len(n), device=n.device)
    while len(rows):  # double the upper ends until they are not below
        rows = rows[below(high[rows], rows) & (high[rows] < _MOST_COUNTS)]
        low[rows], high[rows] = high[rows], 2 * high[rows] + 1
    rows = torch.arange(len(n), device=n.device)
    while len(rows):  # halve what lies between, until it is one step
        rows = rows[high[rows] - low[rows] > 1]
        middle = ((low[rows] + high[rows]) / 2).ceil()
        short = below(middle, rows)
        low[rows[short]], high[rows[~short]] = middle[short], middle[~short]
    return high


def _affine(
    own_loc: Tensor, own_scale: Tensor, loc: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if scale is not None:
        own_loc, own_scale = own_loc * scale, own_scale * scale
    return own_loc if loc is None else own_loc + loc, own_scale


Distribution = StudentT | Normal | NegativeBinomial

DISTRIBUTIONS: Mapping[str, type[Distribution]] = {
    "student_t": StudentT,
    "normal": Normal,
    "negative_binomial": NegativeBinomial,
}
