"""Records to samples: checked, scaled and coded as the train data were; and samples to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.timeseries.calendar import Times, future, time_features
from manyheads.timeseries.frames import check_missing, missing_value
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.sources import File
from manyheads.timeseries.tables import Cells, are_missing
from manyheads.timeseries.tails import Tail
from manyheads.timeseries.windows import fill_gaps


@dataclass(frozen=True)
class Record:
    """One series, or the columns forecast jointly, as far as the model needs it.

    Args:
        id: The series' id, or a wide file's name; the file's name stands before it where there are several.
        series: The series' id as the file has it.
        names: The `unique_id` of each column's rows.
        file: Where it was read.
        tail: The last rows, or what is wrong with them.
    """

    id: str
    series: str
    names: tuple[str, ...]
    file: File
    tail: Tail | DataError


@dataclass(frozen=True)
class Sample:
    """A record ready for the model.

    Args:
        inputs: The keys of a batch that the model is asked with: x, x_mark, y_mark, and those that there are
            of observed, past, future, static.
        mean: What the outputs are shifted by.
        scale: What they are multiplied by.
        ds: Timestamps to forecast.
        columns: The targets.

    Shape:
        inputs as a batch's without its first axis; mean, scale `[N]`, ds `[P]`.
    """

    inputs: Mapping[str, Tensor]
    mean: Tensor
    scale: Tensor
    ds: Times
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Samples of one number of columns, stacked, and their positions in the batch."""

    positions: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    mean: Tensor  # [B, 1, N]
    scale: Tensor  # [B, 1, N]
    ds: tuple[Times, ...]
    columns: tuple[tuple[str, ...], ...]


def prepare(record: Record, of: Preprocessing, variates: int | None) -> Sample:
    """Check a record, and make the model's inputs of it.

    Args:
        record: The record.
        of: How the train data were treated.
        variates: How many columns the model takes; None for any number.

    Raises:
        BadRecord: What is wrong with it, with the row and column.
    """
    tail, targets = record.tail, record.file.layout.targets
    if isinstance(tail, DataError):
        raise BadRecord(str(tail))
    if tail.rows < of.seq_len:
        raise BadRecord(f"{record.file.name}: too short, {tail.rows} rows; the model needs {of.seq_len}")
    _check_columns(record, of, variates)
    try:
        _check_horizon(tail, of)
        _check_missing(record, tail, of)
        mean, scale = of.treatment.statistics(record.series, targets, tail.values)
        covariates = _covariates(tail, of)
    except DataError as error:
        raise BadRecord(str(error)) from None
    scaled = torch.from_numpy((tail.values - mean) / scale).float()
    ahead = future(tail.ds[-1], of.pred_len, of.freq)
    inputs = {
        "x": fill_gaps(scaled[None])[0],
        "x_mark": torch.from_numpy(time_features(tail.ds, of.freq)),
        "y_mark": torch.from_numpy(time_features(ahead, of.freq)),
        **covariates,
    }
    if of.missing == "mask":
        inputs["observed"] = ~scaled.isnan()
    return Sample(inputs, torch.from_numpy(mean), torch.from_numpy(scale), ahead, targets)


def _covariates(tail: Tail, of: Preprocessing) -> dict[str, Tensor]:
    """Scale, code and fill the covariates as the training windows' are."""
    made: dict[str, Tensor] = {}
    lengths = {"past": len(tail.ds), "future": len(tail.ds) + of.pred_len, "static": 1}
    for name, role in of.treatment.covariates.roles.items():
        if role.columns:
            cells = {column: tail.cells[column][: lengths[name]] for column in role.columns}
            coded = torch.from_numpy(of.treatment.encode(role, cells, lengths[name], tail.where))
            made[name] = coded[0].nan_to_num(nan=0.0) if name == "static" else fill_gaps(coded[None])[0]
    return made


def _check_columns(record: Record, of: Preprocessing, variates: int | None) -> None:
    """Refuse columns that a model of a fixed number of variates, in their order, was not trained on."""
    targets = record.file.layout.targets
    if variates is None or (len(targets) == 1 and variates == 1) or tuple(targets) == of.columns:
        return
    raise BadRecord(
        f"{record.file.name}: this model takes the columns that it was trained on, in their order: "
        f"{', '.join(of.columns)}; not {', '.join(targets)}"
    )


def _check_horizon(tail: Tail, of: Preprocessing) -> None:
    """Refuse a future that is not known as far as the model forecasts."""
    columns = of.treatment.covariates.future.columns
    lacking = of.pred_len - len(tail.ahead)
    if columns and lacking > 0:
        last = (tail.ahead if len(tail.ahead) else tail.ds)[-1].item()
        raise DataError(
            f"{lacking} of the {of.pred_len} rows of the horizon are missing, those after {last}: "
            f"the model needs {', '.join(columns)} there, in rows without targets or in a table of the future"
        )
    for column in columns:
        if are_missing(tail.cells[column][len(tail.ds) :]).all():
            raise DataError(f"column {column!r} has no value in the {of.pred_len} rows of the horizon")


def _check_missing(record: Record, tail: Tail, of: Preprocessing) -> None:
    """Refuse missing values, or where they are masked, columns of which nothing is known."""
    targets = record.file.layout.targets
    if of.missing == "refuse":
        check_missing(tail.values, targets, tail.where)
        for column, cells in tail.cells.items():
            _check_cells(column, cells, tail)
    known = np.isin(targets, of.scaler.columns) & (of.treatment.scaling == "global")
    empty = np.asarray(np.isnan(tail.values).all(axis=0))
    if empty.all() or (empty & ~known).any():
        column = targets[int((empty & ~known).argmax())]
        raise BadRecord(f"{record.file.name}: column {column!r} has no value in the last {len(tail.ds)} rows")


def _check_cells(column: str, cells: Cells, tail: Tail) -> None:
    """Refuse a covariate's missing cell."""
    empty = are_missing(cells)
    if empty.any():
        raise missing_value(tail.where(int(empty.argmax())), column)


def collate(samples: Sequence[Sample]) -> list[Group]:
    """Stack samples; those with another number of columns form another group."""
    widths = [sample.inputs["x"].shape[1] for sample in samples]
    return [_group(samples, [i for i, width in enumerate(widths) if width == n]) for n in sorted(set(widths))]


def _group(samples: Sequence[Sample], positions: Sequence[int]) -> Group:
    of = [samples[i] for i in positions]
    return Group(
        tuple(positions),
        {key: torch.stack([s.inputs[key] for s in of]) for key in of[0].inputs},
        torch.stack([s.mean for s in of])[:, None],
        torch.stack([s.scale for s in of])[:, None],
        tuple(s.ds for s in of),
        tuple(s.columns for s in of),
    )
