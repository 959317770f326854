"""How a model's train data were treated: written by `ForecastData`, read back by the predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast, get_args

from manyheads.core.errors import DataError
from manyheads.timeseries.calendar import canonical, feature_names
from manyheads.timeseries.covariates import Covariates, Unseen
from manyheads.timeseries.layout import ColumnNames
from manyheads.timeseries.scaling import Scaling, SeriesScaler, StandardScaler
from manyheads.timeseries.tables import Missing
from manyheads.timeseries.treatment import Treatment


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
_OPTIONAL: dict[str, Callable[[object], bool]] = {
    "scaling": lambda value: value in get_args(Scaling),
    "series_scaler": lambda value: isinstance(value, dict),
    "covariates": lambda value: isinstance(value, dict),
    "covariate_scaler": lambda value: isinstance(value, dict),
    "unseen": lambda value: value in get_args(Unseen),
    "conformal": lambda value: isinstance(value, dict),
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
        treatment: How values and covariates are scaled and coded.
        conformal: What conformal intervals need, where there are any.
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
    treatment: Treatment
    conformal: Mapping[str, object] | None = None

    @property
    def scaler(self) -> StandardScaler:
        """The targets' scaler over all series."""
        return self.treatment.scaler

    @property
    def named(self) -> ColumnNames:
        """Which columns are what."""
        covariates = self.treatment.covariates
        return {
            "time_column": self.time_column,
            "id_column": self.id_column,
            "targets": list(self.targets) if self.targets else None,
            "past": list(covariates.past.columns),
            "future": list(covariates.future.columns),
            "static": list(covariates.static.columns),
            "categorical": list(covariates.categories),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, object]) -> Preprocessing:
        """Read back what was saved: each key known and of its kind, and all there that every model has.

        Raises:
            DataError: The first thing that is wrong.
        """
        lacking, unknown = sorted(set(_KINDS) - set(saved)), sorted(set(saved) - set(_KINDS) - set(_OPTIONAL))
        if lacking or unknown:
            what = f"lacks {lacking}" if lacking else f"has unknown {unknown}"
            raise DataError(f"the model's preprocessing {what}")
        for key, right in (_KINDS | _OPTIONAL).items():
            if key in saved and not right(saved[key]):
                raise DataError(f"the model's preprocessing has {key} = {saved[key]!r}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        own = {k: values[k] for k in values if k in cls.__annotations__}
        made = cls(**own, treatment=_treatment(saved))  # type: ignore[arg-type]
        if made.time_features != feature_names(made.freq) or canonical(made.freq) != made.freq:
            raise DataError(
                f"the model's time features {made.time_features} are not those of freq {made.freq!r}"
            )
        by_series = made.treatment.series_scaler
        if made.columns != made.scaler.columns or (by_series and made.columns != by_series.columns):
            raise DataError("the model's columns are not those of its scaler")
        return made


def _treatment(saved: Mapping[str, object]) -> Treatment:
    """Read how values and covariates are treated."""

    def scaler(key: str) -> dict[str, list[object]]:
        return cast("dict[str, list[object]]", saved[key])

    made = Treatment(
        StandardScaler.from_json(scaler("scaler")),
        cast(Scaling, saved.get("scaling", "global")),
        SeriesScaler.from_json(scaler("series_scaler")) if "series_scaler" in saved else None,
        Covariates.from_json(saved["covariates"]) if "covariates" in saved else Covariates(),
        StandardScaler.from_json(scaler("covariate_scaler"))
        if "covariate_scaler" in saved
        else StandardScaler.identity(()),
        cast(Unseen, saved.get("unseen", "refuse")),
    )
    if made.covariate_scaler.columns != made.covariates.numeric:
        raise DataError("the model's covariates are not those of their scaler")
    if (made.series_scaler is not None) != (made.scaling == "series"):
        raise DataError(f"the model's scaling is {made.scaling!r}, which its scalers do not fit")
    return made
