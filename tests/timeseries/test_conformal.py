"""Conformal intervals: ranks, coverage on like and on drifting windows, no use of what is not known yet."""

import json
import math

import numpy as np
import pytest
import torch

from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.conformal import RollingConformal, SplitConformal, interval_levels

P, N = 6, 2


def noise(n, seed=0, scale=1.0):
    spread = scale * np.arange(1, P + 1)[:, None] * np.array([1.0, 10.0])
    return np.abs(np.random.default_rng(seed).standard_normal((n, P, N))) * spread


def test_levels_are_the_ends_as_python_prints_them():
    assert interval_levels([0.8, 0.9]) == (0.05, 0.1, 0.9, 0.95)
    assert [str(level) for level in interval_levels([0.98, 0.9])] == ["0.01", "0.05", "0.95", "0.99"]


@pytest.mark.parametrize(
    ("n", "coverage", "rank"), [(9, 0.9, 9), (19, 0.9, 18), (20, 0.9, 19), (99, 0.95, 95)]
)
def test_the_radius_is_the_finite_sample_quantile(n, coverage, rank):
    errors = np.random.default_rng(0).permuted(
        np.tile(np.arange(1.0, n + 1)[:, None, None], (1, P, N)), axis=0
    )
    assert (SplitConformal.fit(errors, [coverage], "ab").radius == rank).all()


def test_each_step_and_variate_has_its_own_radius_and_new_windows_are_covered():
    split = SplitConformal.fit(noise(2000), [0.8, 0.9], "ab")
    inside = (noise(2000, seed=1)[None] <= split.radius[:, None]).mean(axis=1)  # [C, P, N]
    assert np.abs(inside - np.array([0.8, 0.9])[:, None, None]).max() < 0.035
    assert split.radius[0, -1, 0] > 4 * split.radius[0, 0, 0]
    assert split.radius[0, 0, 1] > 7 * split.radius[0, 0, 0]


def test_missing_errors_do_not_count():
    errors = noise(60)
    holes = errors.copy()
    holes[30:, 2, 1] = math.nan
    wanted, got = SplitConformal.fit(errors[:30], [0.9], "ab"), SplitConformal.fit(holes, [0.9], "ab")
    assert got.radius[0, 2, 1] == wanted.radius[0, 2, 1]
    assert got.radius[0, 2, 0] == SplitConformal.fit(errors, [0.9], "ab").radius[0, 2, 0]


def test_too_few_windows_are_refused():
    errors = noise(30)
    errors[8:, 3, 1] = math.nan
    with pytest.raises(DataError, match=r"0\.9 needs 9 validation windows; step 4 of column 'b' has 8"):
        SplitConformal.fit(errors, [0.5, 0.9], ["a", "b"])


def test_intervals_are_around_the_point_for_the_columns_asked():
    split = SplitConformal.fit(noise(50), [0.8, 0.9], ["a", "b"])
    point = torch.randn(3, P, 1)
    got = split.apply(point, split.levels, ["b"])
    radius = torch.from_numpy(split.radius[:, :, 1:]).float()
    wanted = torch.stack([point - radius[1], point - radius[0], point + radius[0], point + radius[1]], -1)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(split.apply(point, [0.95], ["b"])[..., 0], wanted[..., 3])
    assert got.dtype == torch.float32


def test_what_was_not_calibrated_is_refused():
    split = SplitConformal.fit(noise(50), [0.8], ["a", "b"])
    with pytest.raises(DataError, match="no conformal interval for column 'c': they were made for a, b"):
        split.apply(torch.zeros(1, P, 1), [0.1], ["c"])
    with pytest.raises(UsageError, match=r"no quantile 0\.2: the model has 0\.1, 0\.9"):
        split.apply(torch.zeros(1, P, 1), [0.2], ["a"])


def test_json_gives_back_the_same_bits():
    split = SplitConformal.fit(noise(50), [0.8, 0.9], ["a", "b"])
    back = SplitConformal.from_json(json.loads(json.dumps(split.to_json())))
    assert (back.columns, back.coverages) == (split.columns, split.coverages)
    assert np.array_equal(back.radius, split.radius)


@pytest.mark.parametrize(
    "change",
    [
        {"radius": [[[1.0, 2.0]]], "coverages": [0.8, 0.9]},
        {"radius": [[[1.0]]]},
        {"radius": [[[1.0, math.inf]]]},
        {"radius": "wide"},
        {"radius": [1.0, 2.0]},
        {"coverages": [1.8]},
        {"coverages": 3},
        {"columns": "ab"},
        {"kernel": 1},
    ],
)
def test_json_that_is_something_else_is_refused(change):
    saved = {"columns": ["a", "b"], "coverages": [0.8], "radius": [[[1.0, 2.0]]]}
    SplitConformal.from_json(saved)
    with pytest.raises(
        DataError, match="conformal intervals must have columns, coverages and a finite radius"
    ):
        SplitConformal.from_json({**saved, **change})


@pytest.mark.parametrize("coverages", [[0.9, 0.8], [1.0], [0.0]])
def test_coverages_must_rise_between_0_and_1(coverages):
    with pytest.raises(UsageError, match="conformal"):
        SplitConformal.fit(noise(50), coverages, "ab")
    with pytest.raises(UsageError, match="conformal"):
        RollingConformal(noise(50), coverages)


def rolled(rolling, errors):
    """The share of errors inside, of each coverage; one after the other."""
    inside = []
    for each in errors:
        inside.append(each[None] <= rolling.radius())
        rolling.add(each)
    return np.stack(inside)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_rolling_intervals_follow_a_drift_that_split_ones_miss(step):
    old, new = noise(300), noise(600, seed=1, scale=3.0)
    split = SplitConformal.fit(old, [0.9], "ab")
    assert (new <= split.radius).mean() < 0.6
    inside = rolled(RollingConformal(old, [0.8, 0.9], step=step, keep=100), new)[200:]
    assert inside[:, 0].mean() == pytest.approx(0.8, abs=0.02)
    assert inside[:, 1].mean() == pytest.approx(0.9, abs=0.02)


def test_rolling_intervals_begin_as_split_ones():
    errors = noise(200)
    radius = RollingConformal(errors, [0.8, 0.9], keep=200).radius()
    assert np.array_equal(radius, SplitConformal.fit(errors, [0.8, 0.9], "ab").radius)


def test_rolling_intervals_take_the_last_errors_as_far_apart_as_forecasts_are():
    errors = noise(200)
    got = RollingConformal(errors, [0.8], step=3, keep=20).radius()
    assert np.array_equal(got, SplitConformal.fit(errors[199 - 57 :: 3], [0.8], "ab").radius)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_error_is_used_when_its_truth_is_known_and_not_before(step):
    """Two runs that differ in the first forecast's errors differ at step h after ceil(h / step) forecasts."""
    one, two = (RollingConformal(noise(100), [0.95], step=step, keep=20) for _ in range(2))
    later = noise(8, seed=2)
    one.add(later[0])
    two.add(later[0] + 1000.0)
    for done in range(1, 8):
        differs = (one.radius() != two.radius())[0].any(axis=1)
        assert differs.tolist()[: done * step] == [True] * min(P, done * step)
        assert not differs[done * step :].any()
        one.add(later[done])
        two.add(later[done])


def test_levels_do_not_swing_where_an_error_is_known_late():
    """Errors that are alike for long, and 48 forecasts old when known, leave the width about as it is."""
    shocks = np.random.default_rng(0).standard_normal(3000)
    path = np.zeros(3000)
    for t in range(1, 3000):
        path[t] = 0.9 * path[t - 1] + shocks[t]
    errors = np.lib.stride_tricks.sliding_window_view(np.abs(path), 48)[:, :, None]
    rolling, wide = RollingConformal(errors[:1000], [0.9], keep=400), []
    inside = rolled(rolling, errors[1000:2500])
    split = SplitConformal.fit(errors[:1000], [0.9], "a").radius
    for each in errors[2500:2900]:
        wide.append(rolling.radius()[0, -1, 0])
        rolling.add(each)
    assert inside.mean() == pytest.approx(0.9, abs=0.02)
    assert np.min(wide) > 0.7 * split[0, -1, 0]
    assert np.max(wide) < 1.4 * split[0, -1, 0]


def test_rolling_with_missing_errors_keeps_what_it_knows():
    rolling = RollingConformal(noise(50), [0.8], keep=50)
    before = rolling.radius()
    hole = np.full((P, N), math.nan)
    for _ in range(10):
        rolling.add(hole)
    assert np.array_equal(rolling.radius(), before)


def test_rolling_quantiles_are_those_of_a_sort():
    """The sorted table that is kept in place against sorting anew, with ties; the level does not move."""
    start, later = noise(30).round(), noise(60, seed=3).round()
    rolling = RollingConformal(start, [0.8], step=P, keep=30, rate=0.0)
    for i, each in enumerate(later):
        last = np.concatenate([start[::-1][::P][::-1], later[:i]])
        keep = len(start[::P])
        wanted = SplitConformal.fit(last[-keep:], [0.8], "ab").radius
        assert np.array_equal(rolling.radius(), wanted)
        rolling.add(each)


def test_rolling_ends_are_in_the_order_of_the_levels():
    rolling, point = RollingConformal(noise(50), [0.8, 0.9]), np.zeros((P, N))
    ends = rolling.apply(point)
    assert ends.shape == (P, N, 4)
    assert (np.diff(ends, axis=-1) > 0).all()
    assert np.array_equal(ends[..., 3], rolling.radius()[1])


def test_rolling_needs_errors_to_begin_with():
    with pytest.raises(DataError, match="to begin with"):
        RollingConformal(np.zeros((0, P, N)), [0.9])
