from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from manyheads.core.errors import DataError
from manyheads.timeseries import calendar

# The features of GluonTS by pandas' own attributes: an independent way to the same numbers.
BY_PANDAS = {
    "second_of_minute": lambda i: i.second / 59,
    "minute_of_hour": lambda i: i.minute / 59,
    "hour_of_day": lambda i: i.hour / 23,
    "day_of_week": lambda i: i.day_of_week / 6,
    "day_of_month": lambda i: (i.day - 1) / 30,
    "day_of_year": lambda i: (i.day_of_year - 1) / 365,
    "month_of_year": lambda i: (i.month - 1) / 11,
    "week_of_year": lambda i: (i.isocalendar().week.to_numpy().astype(float) - 1) / 52,
}
HOURLY = ["hour_of_day", "day_of_week", "day_of_month", "day_of_year"]


def times(start: str, periods: int, freq: str) -> np.ndarray:
    return pd.date_range(start, periods=periods, freq=freq).to_numpy().astype("datetime64[us]")


@pytest.mark.parametrize(
    ("freq", "names"),
    [
        ("h", HOURLY),
        ("2h", HOURLY),
        ("15min", ["minute_of_hour", *HOURLY]),
        ("30s", ["second_of_minute", "minute_of_hour", *HOURLY]),
        ("D", ["day_of_week", "day_of_month", "day_of_year"]),
        ("B", ["day_of_week", "day_of_month", "day_of_year"]),
        ("W-TUE", ["day_of_month", "week_of_year"]),
        ("MS", ["month_of_year"]),
        ("QE-DEC", ["month_of_year"]),
        ("YS-JAN", ["month_of_year"]),
    ],
)
def test_features_equal_pandas(freq: str, names: list[str]) -> None:
    ds = times(
        "1959-12-28 22:15:30", 20_000 if freq in ("h", "15min", "30s") else 700, freq
    )  # before 1970 too
    found = calendar.time_features(ds, freq)
    index = pd.DatetimeIndex(ds)
    expected = np.stack([np.asarray(BY_PANDAS[name](index)) - 0.5 for name in names], axis=1)
    assert calendar.feature_names(freq) == tuple(names)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert found.min() >= -0.5
    assert found.max() <= 0.5


def test_features_of_a_known_hour() -> None:
    found = calendar.time_features(
        np.array(["2016-12-31T23:00"], "datetime64[us]"), "h"
    )  # day 366, a Saturday
    np.testing.assert_allclose(found, [[0.5, 5 / 6 - 0.5, 0.5, 0.5]], atol=1e-7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("H", "h"),
        ("h", "h"),
        ("15T", "15min"),
        ("t", "min"),
        ("S", "s"),
        ("d", "D"),
        ("W", "W-SUN"),
        ("M", "ME"),
        ("Q", "QE-DEC"),
        ("A", "YE-DEC"),
        ("AS", "YS-JAN"),
        ("2MS", "2MS"),
        ("QS-OCT", "QS-JAN"),
        ("QE-JUN", "QE-DEC"),
    ],
)
def test_canonical(given: str, expected: str) -> None:
    assert calendar.canonical(given) == expected
    pd.tseries.frequencies.to_offset(expected)  # pandas knows it


@pytest.mark.parametrize("freq", ["fortnight", "ms", "0h", "", "h-MON", "W-JAN", "-1h", "1.5h", "BME"])
def test_unknown_frequency(freq: str) -> None:
    with pytest.raises(DataError, match="unknown frequency"):
        calendar.canonical(freq)


def test_unknown_frequency_suggests() -> None:
    with pytest.raises(DataError, match="did you mean '15min'"):
        calendar.canonical("15mins")


@pytest.mark.parametrize(
    "freq",
    [
        "s",
        "15min",
        "2h",
        "D",
        "40D",
        "B",
        "2B",
        "W-TUE",
        "2W-SUN",
        "MS",
        "2ME",
        "QS-JAN",
        "QE-NOV",
        "2YS-APR",
    ],
)
def test_infer_and_future_agree_with_pandas(freq: str) -> None:
    ds = times("2019-11-05", 60, freq)
    assert calendar.infer_freq(ds[:40]) == freq
    assert calendar.first_break(ds, freq) is None
    np.testing.assert_array_equal(calendar.future(ds[39], 20, freq), ds[40:])


def test_infer_refuses() -> None:
    assert calendar.infer_freq(times("2020-01-01", 2, "h")) is None
    assert calendar.infer_freq(np.delete(times("2020-01-01", 50, "h"), 20)) is None
    assert calendar.infer_freq(times("2020-01-01", 9, "500ms")) is None


def test_first_break_names_the_row() -> None:
    ds = np.delete(times("2020-01-01", 50, "h"), 20)
    assert calendar.first_break(ds, "h") == 20
    assert calendar.usual_freq(ds) == "h"
    months = np.delete(times("2020-01-01", 50, "MS"), 7)
    assert calendar.first_break(months, "MS") == 7


def test_future_at_month_ends() -> None:
    found = calendar.future(np.datetime64("2024-01-31", "us"), 3, "ME")
    assert found.astype("datetime64[D]").astype(str).tolist() == ["2024-02-29", "2024-03-31", "2024-04-30"]
