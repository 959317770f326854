"""Distributions of forecasts against torch's, and their quantiles against exact ones."""

import math

import mpmath
import pytest
import torch

from manyheads.timeseries.distributions import DISTRIBUTIONS, NegativeBinomial, Normal, StudentT, squareplus
from manyheads.timeseries.special import betainc, student_t_quantile

LEVELS = (0.001, 0.05, 0.5, 0.9, 0.975, 0.999)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def raw_outputs(name, shape=(3, 4), dtype=torch.float64):
    return torch.randn(*shape, DISTRIBUTIONS[name].size, dtype=dtype)


def torchs(name, raw):
    args = [torch.distributions.StudentT, torch.distributions.Normal, torch.distributions.NegativeBinomial]
    kind = dict(zip(("student_t", "normal", "negative_binomial"), args, strict=True))[name]
    parameters = DISTRIBUTIONS[name].parameters(raw)
    if name == "negative_binomial":
        return kind(total_count=parameters[0], logits=parameters[1])
    return kind(*parameters)


def test_squareplus_is_positive_and_smooth_everywhere():
    x = f64(-1e6, -3, 0, 2, 1e6).requires_grad_()
    y = squareplus(x)
    assert torch.allclose(y[1:4], (x[1:4] + (x[1:4] ** 2 + 4).sqrt()) / 2, rtol=1e-14)
    assert y[0].item() == pytest.approx(1e-6)
    y.sum().backward()
    assert x.grad[2] == 0.5
    assert x.grad[4] == pytest.approx(1)
    assert squareplus(torch.tensor([-1e30])).item() > 0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_densities_are_torchs(name):
    raw = raw_outputs(name)
    y = torch.randint(0, 9, (3, 4)).double() if name == "negative_binomial" else torch.randn(3, 4).double()
    ours, theirs = DISTRIBUTIONS[name].of(raw), torchs(name, raw)
    assert torch.allclose(ours.log_prob(y), theirs.log_prob(y), rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours.mean, theirs.mean, rtol=1e-12)


@pytest.mark.parametrize("name", ["student_t", "normal"])
def test_a_scaled_and_shifted_density_is_torchs(name):
    raw, y, loc, scale = raw_outputs(name), torch.randn(3, 4).double(), f64(5.0), f64(0.3)
    transform = torch.distributions.AffineTransform(loc, scale)
    theirs = torch.distributions.TransformedDistribution(torchs(name, raw), [transform])
    ours = DISTRIBUTIONS[name].of(raw, loc, scale)
    assert torch.allclose(ours.log_prob(y), theirs.log_prob(y), rtol=1e-10)
    assert torch.allclose(ours.mean, torchs(name, raw).mean * scale + loc)


def test_scaled_counts_have_a_scaled_mean_and_no_shift():
    raw = raw_outputs("negative_binomial")
    scaled = NegativeBinomial.of(raw, scale=f64(7.0))
    assert torch.allclose(scaled.mean, NegativeBinomial.of(raw).mean * 7)
    with pytest.raises(ValueError, match="not shifted"):
        NegativeBinomial.of(raw, loc=f64(1.0))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_are_torchs_of_the_same_seed(name):
    raw = raw_outputs(name, dtype=torch.float32)
    ours = DISTRIBUTIONS[name].of(raw).sample(1, torch.Generator().manual_seed(4))[0]
    torch.manual_seed(4)
    assert torch.allclose(ours, torchs(name, raw).sample(), rtol=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_have_the_quantiles(name):
    distribution = DISTRIBUTIONS[name].of(raw_outputs(name, (2,)))
    samples = distribution.sample(20_000)
    for level, quantile in zip((0.25, 0.8), distribution.quantile((0.25, 0.8)).T, strict=True):
        assert ((samples <= quantile).double().mean(0) >= level - 0.012).all()
        assert ((samples < quantile).double().mean(0) <= level + 0.012).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
def test_gradients_are_finite_at_extremes(name, size):
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * DISTRIBUTIONS[name].size)
    raw = (signs * size).requires_grad_()
    for y in (0.0, 1.0, 1e6) + ((-1e6,) if name != "negative_binomial" else ()):
        bounded = (
            raw if name != "negative_binomial" else torch.cat([raw[:, :1], raw[:, 1:].clamp(-80, 80)], 1)
        )
        value = DISTRIBUTIONS[name].of(bounded).log_prob(torch.full((len(raw),), y))
        (gradient,) = torch.autograd.grad(value.sum(), raw)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("df", [2.0000001, 2.7, 5.0, 31.0])
def test_student_t_quantiles_are_exact(df):
    found = student_t_quantile(f64(df), LEVELS)
    for level, t in zip(LEVELS, found.tolist(), strict=True):
        tail = mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True) / 2
        assert float(tail) == pytest.approx(min(level, 1 - level), rel=1e-8)
        assert (t > 0) == (level > 0.5)


def test_student_t_quantiles_meet_the_normal_ones_and_closed_forms():
    p = f64(*LEVELS)
    two = (2 * p - 1) / (2 * p * (1 - p)).sqrt()
    assert torch.allclose(student_t_quantile(f64(2.0), LEVELS), two, rtol=1e-9)
    assert student_t_quantile(f64(4.0), (0.975,)).item() == pytest.approx(2.7764451051977987, rel=1e-10)
    normal = torch.special.ndtri(p)
    # The first two terms of the expansion in 1 / df
    large = normal + (normal**3 + normal) / 4 / 1e5
    assert torch.allclose(student_t_quantile(f64(1e5), LEVELS), large, rtol=1e-8)
    assert torch.allclose(student_t_quantile(f64(1e12), LEVELS), normal, rtol=1e-9)


def test_quantiles_scale_and_shift():
    raw = raw_outputs("student_t")
    standard, moved = StudentT.of(raw), StudentT.of(raw, f64(3.0), f64(0.5))
    assert torch.allclose(moved.quantile(LEVELS), standard.quantile(LEVELS) * 0.5 + 3)
    normal = Normal.of(raw_outputs("normal"))
    assert torch.allclose(normal.quantile((0.5,))[..., 0], normal.mean)
    share = torch.special.ndtr((normal.quantile((0.9,))[..., 0] - normal.loc) / normal.scale)
    assert torch.allclose(share, f64(0.9))


def test_each_parameter_may_have_its_own_level():
    distribution = StudentT.of(raw_outputs("student_t", (3, 2)))
    both = distribution.quantile((0.2, 0.7))
    own = distribution.at((0.2, 0.7))
    assert torch.allclose(own, torch.stack([both[:, 0, 0], both[:, 1, 1]], dim=1))


@pytest.mark.parametrize("level", [0.01, 0.5, 0.9, 0.999])
def test_counts_quantiles_are_the_smallest_with_that_probability(level):
    total, mean = torch.cartesian_prod(f64(0.05, 0.7, 3, 50, 5000), f64(0.01, 1, 30, 2000)).T
    distribution = NegativeBinomial(total, (mean / total).log())
    found = distribution.quantile((level,))[:, 0]
    counts = torch.arange(120_000, dtype=torch.float64)[:, None]
    cumulative = distribution.log_prob(counts).exp().cumsum(0)
    assert found.max() < 120_000
    reached = cumulative.gather(0, found[None].long())[0]
    before = torch.where(found > 0, cumulative.gather(0, (found[None] - 1).clamp_min(0).long())[0], 0)
    assert (reached >= level - 1e-9).all()
    assert (before < level + 1e-9).all()


def test_the_incomplete_beta_function():
    for a, b, x in ((0.3, 0.5, 0.9), (2.5, 1.0, 0.01), (40.0, 7.0, 0.8), (700.0, 0.5, 0.999)):
        want = float(mpmath.betainc(a, b, 0, x, regularized=True))
        assert betainc(f64(a), f64(b), f64(x), f64(1 - x)).item() == pytest.approx(want, rel=1e-11)
    a, b, x = 4000, 5000, 0.44  # the probability of `a` heads at least
    heads = torch.arange(a, a + b, dtype=torch.float64)
    ways = math.lgamma(a + b) - torch.lgamma(heads + 1) - torch.lgamma(a + b - heads)
    want = (ways + heads * math.log(x) + (a + b - 1 - heads) * math.log(1 - x)).exp().sum()
    assert betainc(f64(a), f64(b), f64(x), f64(1 - x)).item() == pytest.approx(want.item(), rel=1e-9)
    assert betainc(f64(2.0), f64(3.0), f64(0.0, 1.0), f64(1.0, 0.0)).tolist() == [0, 1]


def test_levels_are_probabilities():
    with pytest.raises(ValueError, match=r"not 1\.5"):
        Normal.of(raw_outputs("normal")).quantile((0.5, 1.5))
