from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from manyheads.core.errors import DataError
from manyheads.timeseries.scaling import SeriesScaler, StandardScaler, window_statistics

RNG = np.random.default_rng(0)


def test_fit_is_the_population_deviation() -> None:
    values = RNG.normal(3.0, 5.0, (500, 3))
    scaler = StandardScaler.fit([values], ["a", "b", "c"])
    np.testing.assert_allclose(scaler.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(scaler.scale, values.std(axis=0, ddof=0), rtol=1e-13)
    scaled = scaler.transform(values)
    np.testing.assert_allclose(scaled.std(axis=0), 1.0, rtol=1e-12)
    np.testing.assert_allclose(scaler.inverse(scaled), values, rtol=1e-12)


def test_fit_pools_series_of_different_lengths() -> None:
    a, b = RNG.normal(size=(100, 2)), RNG.normal(7.0, 2.0, (37, 2))
    pooled = StandardScaler.fit([a, b], ["a", "b"])
    np.testing.assert_allclose(pooled.mean, np.concatenate([a, b]).mean(axis=0), rtol=1e-13)


def test_missing_values_do_not_count() -> None:
    values = RNG.normal(size=(200, 1))
    holed = values.copy()
    holed[::3] = np.nan
    scaler = StandardScaler.fit([holed], ["a"])
    seen = holed[~np.isnan(holed)]
    np.testing.assert_allclose([scaler.mean[0], scaler.scale[0]], [seen.mean(), seen.std()], rtol=1e-13)


@pytest.mark.parametrize("constant", [0.0, 4.2, 0.1, -1e9])
def test_constant_column_becomes_zero(constant: float) -> None:
    values = np.full((1000, 1), constant)
    scaler = StandardScaler.fit([values], ["flat"])
    assert scaler.scale[0] == 1.0
    assert np.abs(scaler.transform(values)).max() <= 1e-12 * max(abs(constant), 1.0)
    assert scaler.transform(values + 2.0)[0, 0] == pytest.approx(2.0, rel=1e-6)


def test_nearly_constant_column_is_scaled() -> None:
    values = 1e6 + RNG.normal(size=(1000, 1))
    assert StandardScaler.fit([values], ["a"]).scale[0] == pytest.approx(values.std(), rel=1e-9)


def test_empty_column_is_refused() -> None:
    values = np.stack([np.arange(5.0), np.full(5, np.nan)], axis=1)
    with pytest.raises(DataError, match="'dead' has no value in the train rows"):
        StandardScaler.fit([values], ["live", "dead"])


def test_json_keeps_every_bit() -> None:
    scaler = StandardScaler.fit([RNG.normal(size=(999, 4)) * np.array([1e-9, 1.0, 1e9, 3.0])], list("abcd"))
    again = StandardScaler.from_json(json.loads(json.dumps(scaler.to_json())))
    assert again.columns == scaler.columns
    assert again.mean.tobytes() == scaler.mean.tobytes()
    assert again.scale.tobytes() == scaler.scale.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": [1]}, "a scaler has columns, mean and scale"),
        ({"mean": [1.0]}, "of one length"),
        ({"scale": [1.0, 0.0]}, "positive"),
        ({"scale": [1.0, -1.0]}, "positive"),
        ({"mean": [float("nan"), 0.0]}, "finite"),
        ({"mean": ["x", "y"]}, "must be numbers"),
    ],
)
def test_from_json_is_strict(change: dict[str, list[object]], message: str) -> None:
    saved: dict[str, list[object]] = {"columns": ["a", "b"], "mean": [0.0, 0.0], "scale": [1.0, 1.0]}
    with pytest.raises(DataError, match=message):
        StandardScaler.from_json({**saved, **change})


def test_unknown_columns_take_their_own_window() -> None:
    scaler = StandardScaler(("a", "b"), np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    context = RNG.normal(50.0, 9.0, (96, 3))
    context[5, 1] = np.nan
    mean, scale = scaler.for_columns(["b", "new", "a"], context)
    seen = np.delete(context[:, 1], 5)
    np.testing.assert_allclose(mean, [2.0, seen.mean(), 1.0], rtol=1e-13)
    np.testing.assert_allclose(scale, [4.0, seen.std(), 3.0], rtol=1e-13)


def test_window_statistics_of_nothing() -> None:
    mean, scale = window_statistics(np.full((5, 1), np.nan))
    assert (mean[0], scale[0]) == (0.0, 1.0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_many_small_tables_give_what_one_gives(offset: float) -> None:
    values = RNG.normal(size=(600, 2)) * np.array([1.0, 1e-3]) + offset
    values[::7, 0] = np.nan
    cuts = [0, 1, 2, 50, 51, 400, 600]
    tables = [values[a:b] for a, b in pairwise(cuts)]
    many, one = StandardScaler.fit(iter(tables), "ab"), StandardScaler.fit([values], "ab")
    np.testing.assert_allclose(many.mean, one.mean, rtol=1e-14)
    np.testing.assert_allclose(many.scale, one.scale, rtol=1e-12 if offset == 0.0 else 1e-6)


def test_a_constant_column_of_many_tables() -> None:
    scaler = StandardScaler.fit([np.full((7, 1), 0.1)] * 1000, ["flat"])
    assert scaler.scale[0] == 1.0


def test_series_have_their_own_statistics() -> None:
    tables = {"a": RNG.normal(5.0, 2.0, (90, 2)), "b": np.full((3, 2), 7.0)}
    scaler = SeriesScaler.fit(tables, ("u", "v"))
    again = SeriesScaler.from_json(json.loads(json.dumps(scaler.to_json())))
    assert again.ids == {"a": 0, "b": 1}
    for each in (scaler, again):
        a, b = each.of("a"), each.of("b")
        assert a is not None
        assert b is not None
        assert a.mean.tobytes() == StandardScaler.fit([tables["a"]], ("u", "v")).mean.tobytes()
        assert a.scale.tobytes() == StandardScaler.fit([tables["a"]], ("u", "v")).scale.tobytes()
        assert (b.mean.tolist(), b.scale.tolist()) == ([7.0, 7.0], [1.0, 1.0])
        assert each.of("c") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a", "a"]}, "one mean and scale a series and column"),
        ({"ids": ["a"]}, "one mean and scale a series and column"),
        ({"scale": [[1.0], [0.0]]}, "positive"),
        ({"extra": []}, "a scaler has ids, columns, mean and scale"),
    ],
)
def test_a_series_scaler_is_read_strictly(change: dict[str, list[object]], message: str) -> None:
    saved = {"ids": ["a", "b"], "columns": ["y"], "mean": [[1.0], [2.0]], "scale": [[1.0], [3.0]]}
    assert SeriesScaler.from_json(saved).mean.shape == (2, 1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        SeriesScaler.from_json({**saved, **change})  # type: ignore[arg-type]


def test_take() -> None:
    scaler = StandardScaler(("a", "b"), np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    taken = scaler.take(("b",))
    assert (taken.columns, taken.mean.tolist(), taken.scale.tolist()) == (("b",), [2.0], [4.0])
