"""The loss over observed targets, and exact sums."""

import math

import pytest
import torch

from manyheads.timeseries.metrics import ErrorSums, masked_mse


def test_loss_is_the_plain_one_without_gaps():
    forecast, y = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(masked_mse(forecast, y), torch.nn.functional.mse_loss(forecast, y))


def test_loss_leaves_gaps_out_and_keeps_gradients_finite():
    forecast, y = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5, 4)
    gaps = torch.rand(3, 5, 4) < 0.3
    loss = masked_mse(forecast, y.masked_fill(gaps, math.nan))
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(forecast[~gaps], y[~gaps]))
    assert (forecast.grad[gaps] == 0).all()
    assert forecast.grad.isfinite().all()
    assert (forecast.grad[~gaps] != 0).all()


def test_loss_of_nothing_is_zero():
    forecast = torch.randn(2, 3, 1, requires_grad=True)
    loss = masked_mse(forecast, torch.full((2, 3, 1), math.nan))
    loss.backward()
    assert loss == 0
    assert (forecast.grad == 0).all()


def test_sums_are_exact_over_uneven_batches_with_gaps():
    forecast, y = torch.randn(2, 11, 5, 4)
    y[0] = 1e4  # one batch far from the others: a mean of batch means, or of float32 sums, would be off
    y[torch.rand_like(y) < 0.2] = math.nan
    sums = ErrorSums()
    for part in (slice(0, 4), slice(4, 10), slice(10, 11)):
        sums.add(forecast[part], y[part])
    errors = [e for e in (forecast - y).flatten().tolist() if not math.isnan(e)]
    assert sums.mse.item() == pytest.approx(math.fsum(e * e for e in errors) / len(errors), rel=1e-13)
    assert sums.mae.item() == pytest.approx(math.fsum(map(abs, errors)) / len(errors), rel=1e-13)
    assert sums.windows == 11


def test_a_forecast_that_is_not_a_number_is_not_hidden():
    sums = ErrorSums()
    sums.add(torch.tensor([[[math.nan]], [[1.0]]]), torch.zeros(2, 1, 1))
    assert sums.mse.isnan()
    assert sums.mae.isnan()
