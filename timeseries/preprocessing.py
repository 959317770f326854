"""How a model's train data were treated: written by `ForecastData`, read back by the predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from manyheads.core.errors import DataError
from manyheads.timeseries.calendar import canonical, feature_names
from manyheads.timeseries.layout import ColumnNames
from manyheads.timeseries.scaling import StandardScaler
from manyheads.timeseries.tables import Missing


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_KINDS: dict[str, Callable[[object], bool]] = {
    "seq_len": _is_length,
    "pred_len": _is_length,
    "columns": _is_names,
    "targets": lambda value: value is None or _is_names(value),
    "time_column": lambda value: value is None or isinstance(value, str),
    "id_column": lambda value: value is None or isinstance(value, str),
    "freq": lambda value: isinstance(value, str),
    "missing": lambda value: value in ("refuse", "mask"),
    "time_features": _is_names,
    "scaler": lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class Preprocessing:
    """How the train data were treated, as `ForecastData.preprocessing` saved it.

    Args:
        seq_len: Rows known.
        pred_len: Rows to forecast.
        columns: The train data's target columns.
        targets: The targets that the caller had named, if any.
        time_column: The time column that the caller had named, if any.
        id_column: The id column that the caller had named, if any.
        freq: Frequency of the timestamps.
        missing: "refuse" or "mask" missing values.
        time_features: Names of the calendar features.
        scaler: The train rows' scaler.
    """

    seq_len: int
    pred_len: int
    columns: tuple[str, ...]
    targets: tuple[str, ...] | None
    time_column: str | None
    id_column: str | None
    freq: str
    missing: Missing
    time_features: tuple[str, ...]
    scaler: StandardScaler

    @property
    def named(self) -> ColumnNames:
        """Which columns are what."""
        targets = list(self.targets) if self.targets else None
        return {"time_column": self.time_column, "id_column": self.id_column, "targets": targets}

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> Preprocessing:
        """Read back what was saved; every key must be there, known and of its kind.

        Raises:
            DataError: The first thing that is wrong.
        """
        wrong = set(saved) ^ set(cls.__annotations__)
        if wrong:
            missing = sorted(wrong - set(saved)) or sorted(wrong)
            raise DataError(
                f"the model's preprocessing {'lacks' if wrong - set(saved) else 'has unknown'} {missing}"
            )
        for key, right in _KINDS.items():
            if not right(saved[key]):
                raise DataError(f"the model's preprocessing has {key} = {saved[key]!r}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        scaler = StandardScaler.from_json(cast("dict[str, list[object]]", saved["scaler"]))
        made = cls(**{**values, "scaler": scaler})  # type: ignore[arg-type]
        if made.time_features != feature_names(made.freq) or canonical(made.freq) != made.freq:
            raise DataError(
                f"the model's time features {made.time_features} are not those of freq {made.freq!r}"
            )
        if made.columns != scaler.columns:
            raise DataError("the model's columns are not those of its scaler")
        return made
