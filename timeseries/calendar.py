"""Frequencies, the timestamps they make, and the calendar features of a timestamp.

A frequency is a pandas alias ("h", "15min", "D", "W-TUE", "MS", ...). The features are those that GluonTS
names, in its order, each a number in [-0.5, 0.5].

Source: time features of GluonTS (https://arxiv.org/abs/1906.05264), as the official code has them.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
from numpy.typing import NDArray

from manyheads.core.errors import DataError, did_you_mean

Times = NDArray[np.datetime64]

_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "D": 86400, "W": 7 * 86400}

# Spellings of pandas 2 and of the forecasting literature, to those of pandas 3.
_OLD = {"S": "s", "T": "min", "t": "min", "m": "min", "H": "h", "d": "D", "w": "W", "b": "B"}
_OLD |= {"M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "a": "YE", "AS": "YS"}

_NAMES: dict[str, tuple[str, ...]] = {
    "s": ("second_of_minute", "minute_of_hour", "hour_of_day", "day_of_week", "day_of_month", "day_of_year"),
    "min": ("minute_of_hour", "hour_of_day", "day_of_week", "day_of_month", "day_of_year"),
    "h": ("hour_of_day", "day_of_week", "day_of_month", "day_of_year"),
    "D": ("day_of_week", "day_of_month", "day_of_year"),
    "B": ("day_of_week", "day_of_month", "day_of_year"),
    "W": ("day_of_month", "week_of_year"),
    # The official code counts one feature for years and lists none; months is the one that its quarters have.
    **dict.fromkeys(("MS", "ME", "QS", "QE", "YS", "YE"), ("month_of_year",)),
}

# A feature counts one unit since the start of another, and is divided by the most it can be.
_PARTS = {
    "second_of_minute": ("s", "m", 59),
    "minute_of_hour": ("m", "h", 59),
    "hour_of_day": ("h", "D", 23),
    "day_of_month": ("D", "M", 30),
    "day_of_year": ("D", "Y", 365),
    "month_of_year": ("M", "Y", 11),
}


@cache
def split_freq(freq: str) -> tuple[int, str, str]:
    """Cut a frequency into its multiple, unit and anchor: "2W-TUE" is (2, "W", "TUE").

    Raises:
        DataError: Not a frequency that has calendar features (a second or longer).
    """
    match = re.fullmatch(r"(\d*)([A-Za-z]+)(?:-([A-Z]{3}))?", freq)
    unit = match and _OLD.get(match[2], match[2])
    if not match or unit not in _NAMES or match[1].startswith("0"):
        hint = did_you_mean(freq, (*_NAMES, "W-MON", "15min"))
        raise DataError(
            f"unknown frequency {freq!r}{hint}; use one of {', '.join(_NAMES)} with a multiple (15min)"
        )
    anchor = match[3] or {"W": "SUN", "QS": "JAN", "YS": "JAN", "QE": "DEC", "YE": "DEC"}.get(unit, "")
    if anchor not in {"W": _WEEKDAYS, "QS": _MONTHS, "QE": _MONTHS, "YS": _MONTHS, "YE": _MONTHS}.get(
        unit, ("",)
    ):
        raise DataError(f"unknown frequency {freq!r}: {unit} does not end in -{anchor}")
    if unit in ("QS", "QE"):  # quarters of one phase have four names
        anchor = _MONTHS[_MONTHS.index(anchor) % 3 + (9 if unit == "QE" else 0)]
    return int(match[1] or 1), unit, anchor


def canonical(freq: str) -> str:
    """Return a frequency in the spelling of pandas 3 ("H" is "h", "15T" is "15min", "W" is "W-SUN").

    Raises:
        DataError: Unknown frequency.
    """
    multiple, unit, anchor = split_freq(freq)
    return f"{multiple if multiple > 1 else ''}{unit}{'-' if anchor else ''}{anchor}"


def fixed_step(freq: str) -> np.timedelta64 | None:
    """Return the constant step of a frequency, or None where the calendar decides (months, business days)."""
    multiple, unit, _ = split_freq(freq)
    return np.timedelta64(multiple * _SECONDS[unit] * 10**6, "us") if unit in _SECONDS else None


def _named_step(step: np.timedelta64, weekday: int) -> str | None:
    """Name a constant step; None where it is no whole number of seconds."""
    micros = int(step / np.timedelta64(1, "us"))
    for unit in ("W", "D", "h", "min", "s"):
        if micros > 0 and micros % (_SECONDS[unit] * 10**6) == 0:
            multiple = micros // (_SECONDS[unit] * 10**6)
            return canonical(f"{multiple}{unit}{f'-{_WEEKDAYS[weekday]}' if unit == 'W' else ''}")
    return None


def _weekday(ds: Times) -> NDArray[np.int64]:
    """Return the weekday, Monday 0; day 0 of the epoch was a Thursday."""
    return (ds.astype("datetime64[D]").astype(np.int64) + 3) % 7


def _calendar_freq(ds: Times) -> str | None:
    """Name a frequency of months, quarters, years or business days."""
    day, month = ds.astype("datetime64[D]"), ds.astype("datetime64[M]")
    clock = ds - day
    if (clock != clock[0]).any():
        return None
    gaps = np.diff(month.astype(np.int64))
    starts, ends = (day == month).all(), (day + 1 == month + 1).all()
    if gaps[0] > 0 and (gaps == gaps[0]).all() and (starts or ends):
        months, edge = int(gaps[0]), "S" if starts else "E"
        name = _MONTHS[int(month[0].astype(np.int64)) % 12]
        if months % 12 == 0:
            return canonical(f"{months // 12}Y{edge}-{name}")
        return canonical(f"{months // 3}Q{edge}-{name}" if months % 3 == 0 else f"{months}M{edge}")
    counts = np.busday_count(day[:-1], day[1:])
    if np.is_busday(day).all() and counts[0] > 0 and (counts == counts[0]).all():
        return canonical(f"{int(counts[0])}B")
    return None


def infer_freq(ds: Times) -> str | None:
    """Infer the frequency of sorted timestamps; None where they keep none or are fewer than three."""
    if len(ds) < 3:
        return None
    steps = np.diff(ds)
    constant = bool((steps == steps[0]).all())
    if constant and steps[0] < np.timedelta64(28, "D"):
        return _named_step(steps[0], int(_weekday(ds[:1])[0]))
    found = _calendar_freq(ds)
    return _named_step(steps[0], int(_weekday(ds[:1])[0])) if found is None and constant else found


def usual_freq(ds: Times) -> str | None:
    """Return the frequency that most steps keep, to name the row that breaks it."""
    step, _ = Counter(np.diff(ds).tolist()).most_common(1)[0]
    return _named_step(np.timedelta64(step), int(_weekday(ds[:1])[0]))


def future(last: np.datetime64, periods: int, freq: str) -> Times:
    """Return the timestamps after `last`.

    Shape:
        Returns `[periods]`, datetime64[us].
    """
    step = fixed_step(freq)
    if step is not None:
        return last + step * np.arange(1, periods + 1)
    import pandas as pd

    made = pd.date_range(pd.Timestamp(last), periods=periods + 1, freq=freq)
    after = made[made > pd.Timestamp(last)][:periods]
    return after.to_numpy().astype("datetime64[us]")


def first_break(ds: Times, freq: str) -> int | None:
    """Return the first row whose step from the row before is not the frequency's; None where all keep it."""
    step = fixed_step(freq)
    if len(ds) < 2:
        return None
    expected = ds[:-1] + step if step is not None else future(ds[0], len(ds) - 1, freq)
    wrong = np.flatnonzero(ds[1:] != expected)
    return int(wrong[0]) + 1 if len(wrong) else None


def feature_names(freq: str) -> tuple[str, ...]:
    """Return the names of the calendar features of a frequency, in column order.

    Example:
        >>> feature_names("h")
        ('hour_of_day', 'day_of_week', 'day_of_month', 'day_of_year')
    """
    return _NAMES[split_freq(freq)[1]]


def _feature(name: str, ds: Times) -> NDArray[np.float64]:
    """Compute one feature, before its shift by a half."""
    if name == "day_of_week":
        return _weekday(ds) / 6
    if name == "week_of_year":  # ISO: a week belongs to the year of its Thursday
        day = ds.astype("datetime64[D]")
        thursday = day - _weekday(ds).astype("timedelta64[D]") + np.timedelta64(3, "D")
        return (thursday - thursday.astype("datetime64[Y]")).astype(np.int64) // 7 / 52
    unit, of, most = _PARTS[name]
    return (ds.astype(f"datetime64[{unit}]") - ds.astype(f"datetime64[{of}]")).astype(np.int64) / most


def time_features(ds: Times, freq: str) -> NDArray[np.float32]:
    """Compute the calendar features of timestamps.

    Args:
        ds: Timestamps, datetime64.
        freq: The frequency, which says what features there are.

    Shape:
        ds `[T]`; returns `[T, M]` in [-0.5, 0.5]; M: second 6, minute 5, hour 4, day 3, week 2, longer 1.
    """
    return np.stack([_feature(name, ds) - 0.5 for name in feature_names(freq)], axis=1).astype(np.float32)
