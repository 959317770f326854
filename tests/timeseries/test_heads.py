"""Heads: what raw outputs mean, what training minimises, and in which units."""

import math

import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.heads import OUTPUTS, QuantileHead, make_head, masked_mean, pinball

LEVELS = [0.05, 0.1, 0.5, 0.9]
LOC, SCALE = torch.tensor([[[3.0, -2.0]]]), torch.tensor([[[10.0, 0.5]]])


def raw(outputs, size=(4, 6, 2)):
    return torch.randn(*size, outputs)


def head_of(output):
    return make_head(output, LEVELS if output == "quantile" else None)


def test_zeros_are_the_quantiles_of_a_standard_normal():
    head = make_head("quantile", LEVELS)
    got = head.forecast(torch.zeros(1, 1, 1, head.outputs), None, None, LEVELS)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(got.quantiles.flatten(), normal.icdf(torch.tensor(LEVELS)))
    assert got.point.item() == 0


@pytest.mark.parametrize("levels", [LEVELS, [0.1], [0.9], [0.5], [0.1, 0.2], [0.6, 0.7, 0.8]])
def test_quantiles_do_not_cross_and_the_point_is_the_median(levels):
    head = make_head("quantile", levels)
    x = 30 * raw(head.outputs)
    got = head.forecast(x, LOC, SCALE, levels)
    assert got.quantiles.shape == (4, 6, 2, len(levels))
    assert (got.quantiles.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(got.point, x[..., 0] * SCALE + LOC)
    for i, level in enumerate(levels):
        side = got.quantiles[..., i] - got.point
        assert (side <= 0).all() if level < 0.5 else (side >= 0).all()


def test_levels_are_answered_in_the_order_asked():
    head = make_head("quantile", LEVELS)
    x = raw(head.outputs)
    every = head.forecast(x, LOC, SCALE, LEVELS).quantiles
    assert torch.equal(head.forecast(x, LOC, SCALE, [0.1, 0.9]).quantiles, every[..., [1, 3]])
    assert head.forecast(x, LOC, SCALE, []).quantiles is None


def test_pinball_is_what_its_definition_says():
    y, quantiles = torch.tensor([[[2.0]]]), torch.tensor([[[[1.0, 5.0]]]])
    assert pinball(quantiles, y, [0.1, 0.9]).item() == pytest.approx((0.1 * 1 + 0.1 * 3) / 2)
    assert pinball(quantiles, torch.full_like(y, math.nan), [0.1, 0.9]).item() == 0


def test_the_quantile_loss_is_least_at_the_quantiles_of_the_targets():
    head, y = make_head("quantile", [0.1, 0.9]), torch.distributions.Exponential(1.0).sample((4000, 1, 1))
    x = torch.zeros(1, 1, 1, head.outputs, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        adam.zero_grad()
        head.loss(x.expand(4000, -1, -1, -1), y, None, None).backward()
        adam.step()
    got = head.forecast(x.detach(), None, None, [0.1, 0.9])
    wanted = y.flatten().quantile(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(got.quantiles.flatten(), wanted, atol=0.02, rtol=0)
    torch.testing.assert_close(got.point.flatten(), y.flatten().median()[None], atol=0.02, rtol=0)


@pytest.mark.parametrize("output", OUTPUTS)
def test_missing_targets_count_nowhere(output):
    head = head_of(output)
    x = raw(head.outputs).requires_grad_()
    y = torch.randint(0, 5, (4, 6, 2)).float()
    loc = None if output == "negative_binomial" else LOC
    y[1:] = math.nan
    loss = head.loss(x, y, loc, SCALE)
    torch.testing.assert_close(loss, head.loss(x[:1], y[:1], loc, SCALE))
    loss.backward()
    assert not x.grad[1:].any()
    assert x.grad[:1].isfinite().all()
    assert head.loss(x, torch.full_like(y, math.nan), loc, SCALE) == 0


@pytest.mark.parametrize("output", ["quantile", "student_t", "normal"])
def test_a_windows_scaling_is_undone(output):
    head = head_of(output)
    x, y = raw(head.outputs), torch.randn(4, 6, 2)
    scaled, plain = head.forecast(x, LOC, SCALE, LEVELS), head.forecast(x, None, None, LEVELS)
    torch.testing.assert_close(scaled.point, plain.point * SCALE + LOC)
    torch.testing.assert_close(scaled.quantiles, plain.quantiles * SCALE[..., None] + LOC[..., None])
    inside = head.loss(x, y, None, None)
    outside = head.loss(x, y * 7 + 3, torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 7.0))
    factor, shift = (7, 0) if output == "quantile" else (1, math.log(7))  # a density is one per unit
    torch.testing.assert_close(outside, inside * factor + shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", ["normal", "student_t", "negative_binomial"])
def test_the_first_output_is_the_location(output):
    head, x = head_of(output), torch.zeros(1, 1, 1, 3 if output == "student_t" else 2)
    if output == "negative_binomial":
        means = [head.forecast(x + torch.tensor([m, 0.0]), None, None, ()).point.item() for m in (0.0, 1.0)]
        assert means[1] == pytest.approx(math.e * means[0])
    else:
        shift = torch.zeros(x.shape[-1])
        shift[0] = 4.0
        assert head.forecast(x + shift, None, None, ()).point.item() == 4


def test_a_scaled_count_has_a_scaled_mean_and_whole_quantiles():
    head, x = make_head("negative_binomial", None), raw(2)
    scale = torch.tensor([[[10.0, 2.0]]])
    plain, scaled = (head.forecast(x, None, each, [0.5, 0.9]) for each in (None, scale))
    torch.testing.assert_close(scaled.point, plain.point * scale)
    assert torch.equal(scaled.quantiles, scaled.quantiles.round())


@pytest.mark.parametrize(("wrong", "said"), [(0.5, "0.5"), (-1.0, "-1")])
def test_a_target_that_is_no_count_is_refused(wrong, said):
    y = torch.ones(4, 6, 2)
    y[0, 0, 0], y[2, 3, 1] = math.nan, wrong
    with pytest.raises(DataError, match=f"negative_binomial forecasts counts, and a target is {said}; "):
        make_head("negative_binomial", None).loss(raw(2), y, None, None)


@pytest.mark.parametrize(
    ("output", "quantiles", "message"),
    [
        ("quantile", [0.9, 0.1], "quantiles out of order: 0.1 after 0.9"),
        ("quantile", [0.1, 1.0], "quantiles: 1.0 is not between 0 and 1"),
        ("quantile", None, "output quantile needs its quantiles"),
        ("quantile", [], "output quantile needs its quantiles"),
        ("normal", [0.1], "quantiles are for output quantile, not normal"),
        ("studentt", None, "no output 'studentt'; did you mean 'student_t'"),
    ],
)
def test_impossible_heads_are_refused(output, quantiles, message):
    with pytest.raises(UsageError, match=message):
        make_head(output, quantiles)


def test_masked_mean_of_nothing_is_zero():
    y = torch.full((1, 2, 1), math.nan)
    assert masked_mean(torch.ones_like(y), y) == 0


def test_many_close_quantiles_stay_in_order_in_single_precision():
    levels = [i / 100 for i in range(1, 100)]
    head = QuantileHead(levels)
    x = torch.cat([1e6 * torch.randn(50, 2, 2, 1), -40 + 45 * torch.rand(50, 2, 2, 98)], dim=-1)
    assert (head.forecast(x, LOC, SCALE, levels).quantiles.diff(dim=-1) >= 0).all()
