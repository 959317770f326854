"""From a data set or a file to train, validation and test windows, by the published protocol.

Source: the splits, the train-only scaling and the window counts of Informer (https://arxiv.org/abs/2012.07436)
and of the papers after it, with no test window dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import share_of
from manyheads.core.tables import column_names
from manyheads.timeseries.calendar import canonical, feature_names
from manyheads.timeseries.covariates import ROLES, Covariates, Sizes, Unseen
from manyheads.timeseries.frames import Series, read
from manyheads.timeseries.layout import ColumnNames, check_names, find_layout
from manyheads.timeseries.scaling import Scaling, StandardScaler
from manyheads.timeseries.tables import Missing
from manyheads.timeseries.treatment import fit_treatment, lay_out
from manyheads.timeseries.windows import WindowLoader, Windows

Split = Literal["ett_hour", "ett_minute", "ratio"]
Ranges = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

_ETT_STEPS_A_DAY = {"ett_hour": 24, "ett_minute": 96}


def find_source(dataset: str, split: Split | None) -> tuple[Path, Split]:
    """Return the file of a data set's name or a path, and the split rule: the one given, or its own."""
    if Path(dataset).suffix:
        return Path(dataset), split or "ratio"
    standard = datasets.find(dataset).split
    return datasets.locate(dataset), split or ("ratio" if standard == "ratio" else "ett_hour")


def split_rows(n: int, split: Split, seq_len: int) -> Ranges:
    """Return the row ranges of train, validation and test; the latter two begin seq_len rows earlier.

    Args:
        n: Rows of the series.
        split: "ett_hour", "ett_minute" (12, 4 and 4 months of 30 days; what follows is unused) or "ratio"
            (0.7, 0.1, 0.2).
        seq_len: Rows known in a window.

    Raises:
        DataError: The series is shorter than the split's months.

    Example:
        >>> split_rows(17420, "ett_hour", 96)
        ((0, 8640), (8544, 11520), (11424, 14400))
    """
    if split == "ratio":
        train, test = int(0.7 * n), int(0.2 * n)
        return (0, train), (train - seq_len, n - test), (n - test - seq_len, n)
    month = 30 * _ETT_STEPS_A_DAY[split]
    if n < 20 * month:
        raise DataError(f'{n} rows; split "{split}" takes {20 * month}, use split="ratio"')
    return (0, 12 * month), (12 * month - seq_len, 16 * month), (16 * month - seq_len, 20 * month)


def _checked_split(series: Series, split: Split, seq_len: int, pred_len: int) -> Ranges:
    """Split one series, each part with one window at least."""
    try:
        ranges = split_rows(len(series.ds), split, seq_len)
    except DataError as error:
        raise DataError(f"series {series.id!r} has {error}") from None
    for part, (first, end) in zip(("train", "validation", "test"), ranges, strict=True):
        if first < 0 or end - first < seq_len + pred_len:
            raise DataError(
                f"series {series.id!r} of {len(series.ds)} rows is too short: the {part} part has no window "
                f"of {seq_len} + {pred_len} rows; shorten seq_len or pred_len, or leave the series out"
            )
    return ranges


class ForecastData(LightningDataModule):
    """Windows of a data set or a file: split, scaled by the train rows, with calendar and covariates.

    Args:
        dataset: Name of a data set, or path of a CSV or parquet file, long or wide.
        seq_len: Rows known.
        pred_len: Rows to forecast.
        batch_size: Windows a batch.
        split: Where the parts begin; None takes the data set's own, and "ratio" for a file.
        freq: Frequency of the timestamps; None infers it.
        scaling: Whose statistics the targets are scaled by: "global" those of all train rows, "series" each
            series' own; "window" leaves it to the model, window by window; "none" scales nothing. Covariates
            are scaled by all train rows.
        missing: "refuse" missing values, or "mask" them: filled in x, left out of the loss in y.
        unseen: "refuse" a category that the train rows have not, or take it for an "unknown" one.
        drop_last: Leave out the last train batch if it is not full; validation and test never lose a window.
        seed: Seed of the train order.
        named: Which columns are what.
    """

    def __init__(
        self,
        dataset: str = "etth1",
        seq_len: int = 96,
        pred_len: int = 96,
        batch_size: int = 32,
        split: Split | None = None,
        freq: str | None = None,
        scaling: Scaling = "global",
        missing: Missing = "refuse",
        unseen: Unseen = "refuse",
        drop_last: bool = True,
        seed: int = 0,
        **named: Unpack[ColumnNames],
    ) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("pred_len", pred_len), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        check_names(named)
        self.dataset, self.split, self.seq_len, self.pred_len = dataset, split, seq_len, pred_len
        self.batch_size, self.drop_last, self.seed, self.named = batch_size, drop_last, seed, named
        self.given_freq, self.missing = canonical(freq) if freq else None, missing
        self.scaling, self.unseen = scaling, unseen
        self._ready = False

    @property
    def path(self) -> Path:
        """The file that the data come from."""
        return find_source(self.dataset, self.split)[0]

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data, with the row.
        """
        if self._ready:
            return
        path, split = find_source(self.dataset, self.split)
        layout = find_layout(column_names(path), str(path), **self.named)
        series = read(path, freq=self.given_freq, missing=self.missing, **self.named)
        self.columns, self.freq = list(series[0].columns), series[0].freq
        self.series = [each.id for each in series]
        ranges = [_checked_split(each, split, self.seq_len, self.pred_len) for each in series]
        # A wide table is one series, whose columns each have their own scale anyway.
        scaling: Scaling = "global" if layout.id is None and self.scaling == "series" else self.scaling
        train = [part[0] for part in ranges]
        self.treatment = fit_treatment(series, train, layout, scaling, self.unseen)
        self.n_marks = len(feature_names(self.freq))
        table = lay_out(series, self.treatment)
        del series
        parts = [
            [(first + offset, end + offset) for offset, (first, end) in zip(table.offsets, part, strict=True)]
            for part in zip(*ranges, strict=True)
        ]
        covariates, n, masked = self.treatment.covariates, len(self.columns), self.missing == "mask"
        sizes = len(covariates.past.columns), len(covariates.future.columns)
        self.train_windows, self.val_windows, self.test_windows = (
            Windows(table.rows, n, part, self.seq_len, self.pred_len, *sizes, table.static, masked)
            for part in parts
        )
        if self.drop_last and len(self.train_windows) < self.batch_size:
            raise DataError(
                f"{len(self.train_windows)} train windows do not fill a batch of {self.batch_size}; "
                "lower batch_size or set drop_last to false"
            )
        self._ready = True

    @property
    def scaler(self) -> StandardScaler:
        """The targets' scaler over all series; that of one series is in `treatment`."""
        return self.treatment.scaler

    @property
    def covariate_sizes(self) -> Sizes:
        """The sizes of the covariates that a model's builder takes; reads the data where there are any."""
        if not any(self.named.get(role) for role in ROLES):
            return Covariates().sizes()
        self.setup()
        return self.treatment.covariates.sizes()

    def inverse(self, values: Tensor, series: Tensor) -> Tensor:
        """Return values of a batch in their own units.

        Args:
            values: Scaled targets or forecasts.
            series: The batch's `series`.

        Shape:
            values `[B, P, N]`, or `[B, P, N, Q]`; returns the same in float64.
        """
        context = np.zeros((0, len(self.columns)))  # of a train series nothing else is asked
        found = [self.treatment.statistics(self.series[i], self.columns, context) for i in series.tolist()]
        mean, scale = (
            torch.from_numpy(np.stack(each))[:, None].to(values.device) for each in zip(*found, strict=True)
        )
        if values.ndim == 4:
            mean, scale = mean[..., None], scale[..., None]
        return values.double() * scale + mean

    def train_dataloader(self) -> WindowLoader:
        """Return the train batches, in a new order each epoch."""
        return WindowLoader(
            self.train_windows, self.batch_size, True, self.drop_last, self.seed, share_of(self.trainer)
        )

    def val_dataloader(self, alone: bool = False) -> WindowLoader:
        """Return the validation batches: this process' share of them, or all."""
        part = share_of(None if alone else self.trainer)
        return WindowLoader(self.val_windows, self.batch_size, part=part)

    def test_dataloader(self) -> WindowLoader:
        """Return this process' share of the test batches."""
        return WindowLoader(self.test_windows, self.batch_size, part=share_of(self.trainer))

    def predict_dataloader(self) -> WindowLoader:
        """Return the test batches, to forecast them."""
        return self.test_dataloader()

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new data as the train data were; plain JSON."""
        targets = self.named.get("targets")
        return {
            "seq_len": self.seq_len,
            "pred_len": self.pred_len,
            "columns": self.columns,
            "targets": list(targets) if targets else None,
            "time_column": self.named.get("time_column"),
            "id_column": self.named.get("id_column"),
            "freq": self.freq,
            "missing": self.missing,
            "time_features": list(feature_names(self.freq)),
            **self.treatment.to_json(),
        }
