"""Functions that torch lacks: the regularised incomplete beta function, and quantiles made of it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_LARGE = 3000.0  # above, for both parameters, the integrand is narrow and quadrature beats the fraction
_MOST_TERMS = 10_000
_TINY = 1e-300
_NODES = 64  # of the interpolation over 1 / df, which then errs by less than 1e-9


def betainc(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """Return the regularised incomplete beta function, in double precision.

    Args:
        a, b: Positive.
        x: From 0 to 1.
        rest: 1 - x, which the caller can tell without losing digits.

    Shape:
        Any that broadcast.

    Source:
        NIST Digital Library of Mathematical Functions, 8.17.22, evaluated by the modified Lentz method.
    """
    a, b, x, rest = torch.broadcast_tensors(a.double(), b.double(), x.double(), rest.double())
    swap = x > (a + 1) / (a + b + 2)  # where the fraction converges faster for the complement
    a, b, x, rest = (torch.where(swap, *pair) for pair in ((b, a), (a, b), (rest, x), (x, rest)))
    inside = (x > 0) & (rest > 0)
    safe, rest = torch.where(inside, x, 0.5), torch.where(inside, rest, 0.5)
    log_front = a * safe.log() + b * rest.log() - _log_beta(a, b) - a.log()
    wide = (a > _LARGE) & (b > _LARGE)
    part = log_front.exp() * _fraction(torch.where(wide, 1.0, a), torch.where(wide, 1.0, b), safe)
    if bool(wide.any()):
        part = torch.where(wide, _narrow(a, b, safe), part)
    part = torch.where(inside, part, x.clamp(0, 1))
    return torch.where(swap, 1 - part, part)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    def away(value: Tensor) -> Tensor:
        return torch.where(value.abs() < _TINY, _TINY, value)

    d = 1 / away(1 - (a + b) * x / (a + 1))
    c, value = torch.ones_like(x), d
    for m in range(1, _MOST_TERMS):
        before = value
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / away(1 + term * d), away(1 + term / c)
            value = value * d * c
        if bool(((value - before).abs() <= 1e-15 * value.abs()).all()):
            break
    return value


def _narrow(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Integrate from 0 to x, which lies below the mean, by Gauss and Legendre's rule over ten deviations."""
    mean = a / (a + b)
    deviation = (mean * (1 - mean) / (a + b + 1)).sqrt()
    low = torch.minimum(mean - 12 * deviation, x - 6 * deviation).clamp_min(0)
    nodes, weights = (each.to(x.device) for each in _legendre(96))
    t = (low[..., None] + (x - low)[..., None] * (nodes + 1) / 2).clamp_min(_TINY)
    a, b = a[..., None], b[..., None]
    log_density = (a - 1) * t.log() + (b - 1) * torch.log1p(-t) - _log_beta(a, b)
    return (log_density.exp() * weights).sum(-1) * (x - low) / 2


@lru_cache(maxsize=4)
def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on [-1, 1], by Newton's method from the usual guess."""
    k = torch.arange(count, dtype=torch.float64)
    x = torch.cos(math.pi * (k + 0.75) / (count + 0.5))
    for _ in range(8):
        before, value = torch.ones_like(x), x
        for n in range(2, count + 1):
            before, value = value, ((2 * n - 1) * x * value - (n - 1) * before) / n
        slope = count * (x * value - before) / (x * x - 1)
        x = x - value / slope
    return x, 2 / ((1 - x * x) * slope * slope)


def student_t_quantile(df: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return quantiles of Student's t distribution of at least 2 degrees of freedom.

    The logarithm of the ratio to the normal quantile is smooth in 1 / df; it is solved at Chebyshev nodes,
    once for some levels, and interpolated, so that many elements cost little.

    Args:
        df: Degrees of freedom.
        levels: Between 0 and 1.

    Shape:
        df `[..., Q]` or `[..., 1]`, for Q levels -> `[..., Q]`, in double precision.
    """
    tails = [min(level, 1 - level) for level in levels]
    ratios = torch.stack([_ratio_coefficients(tail) for tail in tails], dim=-1).to(df.device)  # [nodes, Q]
    u = 4 / df.double() - 1  # 1 / df from [0, 1/2] to [-1, 1]
    high, higher = torch.zeros_like(u), torch.zeros_like(u)
    for row in ratios[1:].flip(0):  # Clenshaw's recurrence
        high, higher = 2 * u * high - higher + row, high
    normal = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64, device=df.device))
    return normal * (u * high - higher + ratios[0]).exp()


@lru_cache(maxsize=4096)
def _ratio_coefficients(tail: float) -> Tensor:
    """Return Chebyshev's coefficients of log(t / z) over 1 / df, for one upper tail."""
    if tail == 0.5:
        return torch.zeros(_NODES, dtype=torch.float64)
    angles = math.pi * (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES
    df, half = 4 / (angles.cos() + 1), torch.tensor(0.5, dtype=torch.float64)
    z = -torch.special.ndtri(torch.tensor(tail, dtype=torch.float64))
    # Newton's method on the logarithms of tail and quantile, from Wallace's inequality; the logarithm of the
    # tail is concave in log(t), so that a start below the root is passed once and one above comes down to it.
    start = torch.expm1((z * (8 * df + 3) / (8 * df + 1)).square() / df) * df
    log_t = start.log() / 2
    for _ in range(20):
        t = log_t.exp()
        upper = _upper_tail(df, t)
        log_density = -(df + 1) / 2 * torch.log1p(t * t / df) - df.log() / 2 - _log_beta(df / 2, half)
        step = (upper.log() - math.log(tail)) * upper / (log_density.exp() * t)
        log_t = log_t + step
        if bool((step.abs() < 1e-11).all()):  # it converges quadratically
            break
    values = log_t - z.log()
    orders = torch.arange(_NODES, dtype=torch.float64)
    coefficients = (torch.cos(orders[:, None] * angles) * values).mean(-1) * 2
    coefficients[0] /= 2
    return coefficients


def _upper_tail(df: Tensor, t: Tensor) -> Tensor:
    total = df + t * t
    return betainc(df / 2, df.new_tensor(0.5), df / total, t * t / total) / 2
