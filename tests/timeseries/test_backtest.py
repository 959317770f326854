"""Rolling windows: which they are, that forecasts are prediction's, and intervals around them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.timeseries.backtest import Parts, RollingModel, Schedule, cut, known_columns, season_of, units
from manyheads.timeseries.calendar import feature_names
from manyheads.timeseries.conformal import RollingConformal, SplitConformal
from manyheads.timeseries.frames import read
from manyheads.timeseries.predictor import Predictor
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.rolling import Fixed, Rolling, coverages_of, errors_of

L, P = 8, 3


def made(**changes: object) -> Preprocessing:
    saved = {
        "seq_len": L,
        "pred_len": P,
        "columns": ["y"],
        "targets": None,
        "time_column": None,
        "id_column": None,
        "freq": "h",
        "missing": "refuse",
        "time_features": list(feature_names("h")),
        "scaler": {"columns": ["y"], "mean": [2.0], "scale": [3.0]},
    }
    return Preprocessing.from_json({**saved, **changes})


def long(**rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame(
            {"unique_id": name, "ds": pd.date_range("2024", periods=n, freq="h"), "y": rng.normal(5, 2, n)}
        )
        for name, n in rows.items()
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def model() -> nn.Module:
    return create_model("dlinear", seq_len=L, pred_len=P, moving_avg=3).eval()


@pytest.mark.parametrize(
    ("freq", "season"), [("h", 24), ("15min", 96), ("D", 7), ("W-SUN", 52), ("MS", 12), ("5h", 1), ("YE", 1)]
)
def test_seasons(freq: str, season: int) -> None:
    assert season_of(freq) == season


def test_windows_end_with_the_test_part_and_stand_in_order() -> None:
    series = read(long(a=40, b=60))
    parts = cut(series, made(), None, 15)
    assert parts[0] == Parts((0, 25), (2, 25), (17, 40))
    schedule = Schedule(series, parts, made(), step=4)
    assert schedule.numbers.tolist() == [4, 4]  # 13 windows each, every fourth
    assert schedule.total == 8
    batches = [each.tolist() for each in schedule.batches((0, 4), 3)]
    assert batches == [[0, 4, 8], [12, 13, 17], [21, 25]]
    assert schedule.first_targets(0) == [25, 45]  # the test parts' first rows: the last windows end with them
    assert schedule.first_targets(3) == [37, 57]


def test_blocks_part_the_windows_of_uneven_series() -> None:
    series = read(long(a=40, b=100))
    parts = cut(series, made(), "ratio", None)  # 8 and 20 rows are tested: 6 and 18 windows
    schedule = Schedule(series, parts, made())
    assert schedule.numbers.tolist() == [6, 18]
    blocks = schedule.blocks(7)
    assert blocks == [(0, 7), (7, 14), (14, 18)]
    found = [i for block in blocks for each in schedule.batches(block, 5) for i in each.tolist()]
    assert sorted(found) == list(range(24))
    assert Schedule(series, parts, made(), 1, 2).blocks(None) == [(0, 2)]
    assert Schedule(series, parts, made(), 1, 2).last(1).tolist() == [23]


def test_what_is_too_short_is_named() -> None:
    series = read(long(a=100, b=12))
    with pytest.raises(DataError, match=r"series 'b' of 12 rows is too short: its last fifth has no window"):
        cut(series, made(), None, None)
    with pytest.raises(DataError, match=r"series 'b' .*take 8 \+ 7 rows; lower --windows"):
        cut(series, made(), None, 7)
    with pytest.raises(UsageError, match="series 'a' has 18 windows in its test part at step 1, not 19"):
        Schedule(series[:1], cut(series[:1], made(), "ratio", None), made(), 1, 19)


@pytest.mark.parametrize("scaling", ["global", "series", "none"])
def test_a_window_is_forecast_as_prediction_does(model: nn.Module, scaling: str) -> None:
    """Of series and columns that the train data had, and of others."""
    changes: dict[str, object] = {} if scaling == "global" else {"scaling": scaling}
    if scaling == "series":
        numbers = {"mean": [[2.0]], "scale": [[3.0]]}
        changes["series_scaler"] = {"ids": ["a"], "columns": ["y"], **numbers}
    if scaling == "none":
        changes["scaler"] = {"columns": ["y"], "mean": [0.0], "scale": [1.0]}
    of, frame = made(**changes), long(a=40, b=50)
    series = read(frame)
    tester = RollingModel(model, of, series)
    windows = tester.windows([(0, 40), (0, 50)])
    answer = tester.ask(windows, np.array([3, 29, 29 + 11, 69]))
    assert answer.series.tolist() == [0, 0, 1, 1]
    assert answer.rows.tolist() == [3 + L, 29 + L, 10 + L, 39 + L]
    for point, y, row, name in zip(answer.point, answer.y, answer.rows, "aabb", strict=True):
        one = frame[frame["unique_id"] == name]
        expected = Predictor(model, of).predict(one[:row])["yhat"]
        np.testing.assert_allclose(point[:, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(y[:, 0], one["y"][row : row + P], rtol=1e-6)
    assert known_columns(of.treatment, "b", ["y"]) == [scaling != "series"]
    assert known_columns(of.treatment, "b", ["z"]) == [scaling == "none"]
    scale = units(series, [Parts((0, 20), (0, 0), (0, 0))] * 2, of)
    own = series[1].values[:20].std()
    assert (
        scale.flatten().tolist()
        == {
            "global": [3.0, 3.0],
            "series": [3.0, pytest.approx(own)],
            "none": [1.0, 1.0],
        }[scaling]
    )


def test_the_model_never_sees_the_truth() -> None:
    class Looks(nn.Module):
        levels = ()

        def predict(self, batch, levels=()):  # type: ignore[no-untyped-def]
            assert batch["y"].isnan().all()
            raise KeyError("asked")

        def loss(self, batch):  # type: ignore[no-untyped-def]
            raise AssertionError

    tester = RollingModel(Looks(), made(), read(long(a=30)))
    with pytest.raises(KeyError, match="asked"):
        tester.ask(tester.windows([(0, 30)]), np.array([0]))


def test_a_model_of_fixed_columns_refuses_others() -> None:
    fixed = create_model("dlinear", seq_len=L, pred_len=P, moving_avg=3)
    fixed.variates = 2  # type: ignore[assignment]
    with pytest.raises(DataError, match="takes the columns that it was trained on, in their order: y; not z"):
        RollingModel(fixed, made(), read(long(a=30).rename(columns={"y": "z"})))


def test_levels_are_the_ends_of_intervals() -> None:
    assert coverages_of([0.05, 0.25, 0.75, 0.95]) == (0.5, 0.9)
    with pytest.raises(UsageError, match=r"level 0\.1 needs 0\.9 too"):
        coverages_of([0.1, 0.25, 0.75])
    with pytest.raises(UsageError, match=r"level 0\.5 is the point forecast itself"):
        coverages_of([0.1, 0.5, 0.9])


def test_split_intervals_are_those_of_the_errors_before(model: nn.Module) -> None:
    series = read(long(a=60, b=70))
    tester, ranges = RollingModel(model, made(), series), [(0, 40), (0, 40)]
    fixed = Fixed.fit(tester, ranges, ["y"], [0.1, 0.9], 16)
    before = tester.windows(ranges)
    own, both = errors_of(tester, before, np.arange(len(before)), 16)
    assert own.shape == (2 * 30, P, 1)
    np.testing.assert_allclose(own, both * 3.0)
    radius = SplitConformal.fit(both, [0.8], ["y"]).radius[0] * 3.0
    answer = tester.ask(tester.windows([(40, 60), (40, 60)]), np.arange(4))
    made_ = fixed.around(answer)
    np.testing.assert_allclose(made_[..., 1] - answer.point, np.broadcast_to(radius, (4, P, 1)))
    np.testing.assert_allclose(answer.point - made_[..., 0], np.broadcast_to(radius, (4, P, 1)))


def test_rolling_intervals_go_on_series_by_series(model: nn.Module) -> None:
    series = read(long(a=60, b=70))
    tester, before, after = RollingModel(model, made(), series), [(0, 40), (0, 40)], [(32, 60), (32, 60)]
    rolling = Rolling(tester, before, [0.1, 0.9], 1, 16)
    windows = tester.windows(after)
    answer = tester.ask(windows, np.arange(len(windows)))
    found = torch.cat(
        [rolling.around(tester.ask(windows, part)) for part in np.array_split(np.arange(len(windows)), 5)]
    )
    for i in range(2):
        known = tester.windows([r if i == k else (0, 0) for k, r in enumerate(before)])
        assert len(known) == 30
        state = RollingConformal(errors_of(tester, known, np.arange(30), 64)[0], [0.8], 1)
        for k in np.flatnonzero(answer.series.numpy() == i):
            # float32 forecasts in batches of other sizes
            np.testing.assert_allclose(found[k], state.apply(answer.point[k].numpy()), rtol=1e-6)
            state.add((answer.y - answer.point).abs()[k].numpy())
