"""The loss over observed targets, and exact sums."""

import math

import pytest
import torch
import torchmetrics

from manyheads.timeseries.metrics import ErrorSums, SeriesSums, intervals, masked_mse, seasonal_scale


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


def test_intervals_are_the_mirrored_levels():
    assert intervals([0.05, 0.1, 0.5, 0.9, 0.95]) == [(0, 4), (1, 3)]
    assert intervals([0.1, 0.5]) == []
    assert intervals([0.3, 0.7]) == [(0, 1)]  # 1 - 0.7 is not 0.3 in binary


def test_the_naive_scale_is_that_of_pairs_a_season_apart():
    rows = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0], [math.nan, 5.0], [9.0, 5.0]]).double()
    scale = seasonal_scale(rows, 2)
    assert scale[0] == (3 + 5) / 2  # rows 2 and 4; row 3 is missing
    assert scale[1].isnan()  # constant
    assert seasonal_scale(rows, 5).isnan().all()


@pytest.fixture
def windows():
    """Forecasts, quantiles and targets of 13 windows of 3 series of 2 variates, some targets missing."""
    y = torch.randn(13, 5, 2) * torch.tensor([1.0, 100.0]) + 3
    point = y + torch.randn_like(y)
    quantiles = point[..., None] + torch.tensor([-1.5, -0.5, 0.1, 0.5, 1.5])
    y[torch.rand_like(y) < 0.2] = math.nan
    return point, quantiles, y, torch.arange(13) % 3


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def filled(windows):
    """Sums of all windows, in uneven batches."""
    unit, naive = torch.rand(3, 2).double() + 0.5, torch.rand(3, 2).double() + 0.5
    naive[1, 0] = math.nan
    sums = SeriesSums(unit, naive, LEVELS)
    for part in (slice(0, 4), slice(4, 5), slice(5, 13)):
        sums.add(*(each[part] for each in windows))
    return sums, unit, naive


def by_hand(point, quantiles, y, unit, naive):
    """The definitions, target by target."""
    rows = [
        (p, q, t, u, n)
        for p, q, t, u, n in zip(
            point.double().flatten().tolist(),
            quantiles.double().flatten(0, -2).tolist(),
            y.double().flatten().tolist(),
            unit.expand_as(y).flatten().tolist(),
            naive.expand_as(y).flatten().tolist(),
            strict=True,
        )
        if not math.isnan(t)
    ]
    mean = lambda values: math.fsum(values) / len(values)  # noqa: E731
    losses = [
        math.fsum(2 * max(level * (t - q[i]), (level - 1) * (t - q[i])) for _, q, t, _, _ in rows)
        for i, level in enumerate(LEVELS)
    ]
    size = math.fsum(abs(t) for _, _, t, _, _ in rows)
    return {
        "targets": len(rows),
        "mse": mean([(t - p) ** 2 for p, _, t, _, _ in rows]),
        "mae": mean([abs(t - p) for p, _, t, _, _ in rows]),
        "mse_scaled": mean([((t - p) / u) ** 2 for p, _, t, u, _ in rows]),
        "mae_scaled": mean([abs(t - p) / u for p, _, t, u, _ in rows]),
        "mase": mean([abs(t - p) / n for p, _, t, _, n in rows if not math.isnan(n)] or [math.nan]),
        "smape": mean([2 * abs(t - p) / (abs(t) + abs(p)) for p, _, t, _, _ in rows]),
        "wql": mean(losses) / size,
        "below": [mean([float(t <= q[i]) for _, q, t, _, _ in rows]) for i in range(5)],
        "coverage": [mean([float(q[i] <= t <= q[4 - i]) for _, q, t, _, _ in rows]) for i in range(2)],
        "width": [mean([q[4 - i] - q[i] for _, q, _, _, _ in rows]) for i in range(2)],
        "width_scaled": [mean([(q[4 - i] - q[i]) / u for _, q, _, u, _ in rows]) for i in range(2)],
    }


def test_figures_are_those_computed_by_hand(windows):
    point, quantiles, y, series = windows
    sums, unit, naive = filled(windows)
    found = sums.by_series()
    for s in range(3):
        for n in range(2):
            of = series == s
            parts = [each[of][:, :, n : n + 1] for each in (point, quantiles, y)]
            wanted = by_hand(*parts, unit[s, n], naive[s, n])
            assert set(found) == set(wanted)
            for name, value in wanted.items():
                assert found[name][s, n].tolist() == pytest.approx(value, rel=1e-12, nan_ok=True), name
    overall = sums.overall()
    for name, value in by_hand(point, quantiles, y, unit[series][:, None], naive[series][:, None]).items():
        assert overall[name].tolist() == pytest.approx(value, rel=1e-12), name
    assert sums.windows.tolist() == [5, 4, 4]


def test_errors_agree_with_torchmetrics(windows):
    point, _, y, _ = windows
    overall, there = filled(windows)[0].overall(), ~y.isnan()
    a, b = point[there].double(), y[there].double()
    torch.testing.assert_close(overall["mse"], torchmetrics.functional.mean_squared_error(a, b))
    torch.testing.assert_close(overall["mae"], torchmetrics.functional.mean_absolute_error(a, b))
    smape = torchmetrics.functional.symmetric_mean_absolute_percentage_error(a, b)
    torch.testing.assert_close(overall["smape"], smape)


def test_the_weighted_loss_of_the_median_alone_is_the_error_over_the_size():
    y, point = torch.randn(2, 4, 5, 1)
    sums = SeriesSums(torch.ones(1, 1), torch.ones(1, 1), [0.5])
    sums.add(point, point[..., None], y, torch.zeros(4, dtype=torch.int64))
    expected = (y - point).double().abs().sum() / y.double().abs().sum()
    assert sums.overall()["wql"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.overall()["coverage"].numel() == 0


def test_nothing_and_twice_nothing():
    sums = SeriesSums(torch.ones(2, 1), torch.ones(2, 1))
    sums.add(torch.zeros(1, 3, 1), None, torch.zeros(1, 3, 1), torch.tensor([1]))
    found = sums.by_series()
    assert found["smape"].tolist()[1] == [0.0]  # 0 over 0
    assert found["mse"].isnan().tolist() == [[True], [False]]
    assert found["wql"].isnan().all()


def test_a_forecast_that_is_not_a_number_shows_in_every_figure():
    sums = SeriesSums(torch.ones(1, 1), torch.ones(1, 1))
    sums.add(
        torch.tensor([[[math.nan]], [[1.0]]]), None, torch.ones(2, 1, 1), torch.zeros(2, dtype=torch.int64)
    )
    assert all(sums.overall()[name].isnan() for name in ("mse", "mae", "mase", "smape"))
