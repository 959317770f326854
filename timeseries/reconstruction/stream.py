"""Whole series as windows side by side, read in bounded memory, checked and scaled as the train data were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError
from manyheads.timeseries import sources, tables
from manyheads.timeseries.calendar import Times, time_features
from manyheads.timeseries.frames import check_missing, check_times
from manyheads.timeseries.inputs import Shard
from manyheads.timeseries.preprocessing import Preprocessing
from manyheads.timeseries.sources import File, Run

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """A window of a series.

    Args:
        id: The series' name and the rows, for errors.
        name: The series' name; the file's stands before it where there are several.
        series: The series' id as the file has it.
        file: Where it was read.
        first: The window's first row in the series.
        new: How many of its rows, at its end, no window before had.
        ds: Timestamps.
        values: The cells, NaN where missing.

    Shape:
        ds `[L]`, values `[L, N]`.
    """

    id: str
    name: str
    series: str
    file: File
    first: int
    new: int
    ds: Times
    values: Floats


@dataclass(frozen=True)
class Broken:
    """What of a series cannot be read, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A window ready for the model, and how to return to its own units."""

    x: Tensor  # [L, N] scaled, zeros where missing
    observed: Tensor  # [L, N] bool
    x_mark: Tensor  # [L, M]
    mean: Floats  # [N]
    scale: Floats  # [N]


@dataclass(frozen=True)
class Group:
    """Samples of one number of columns, stacked, and their positions in the batch."""

    positions: tuple[int, ...]
    x: Tensor  # [B, L, N]
    observed: Tensor  # [B, L, N]
    x_mark: Tensor  # [B, L, M]


def read(shard: Shard, of: Preprocessing) -> Iterator[Piece | Broken]:
    """Stream the windows of a shard's series; of what comes after a broken row, nothing."""
    for i, places in groupby(shard.runs, key=itemgetter(0)):
        file, runs = shard.files[i], [run for _, run in places]
        columns = (file.layout.time, *file.layout.targets)
        for run, blocks in sources.read_blocks(file, runs, columns):
            yield from _pieces(file, run, blocks, of)


def _pieces(file: File, run: Run, blocks: Iterable[pa.Table], of: Preprocessing) -> Iterator[Piece | Broken]:
    """Cut one series into windows; the last one ends with it."""
    name = f"{file.prefix}{run.id}" if file.layout.id else run.id
    length, given, front = of.seq_len, 0, 0  # rows given, and rows in front of what is held
    ds, values = np.zeros(0, "datetime64[us]"), np.zeros((0, len(file.layout.targets)))

    def piece(begin: int) -> Piece:
        end = begin + length
        held = slice(begin - front, end - front)
        ident = f"{name}[{begin}:{end}]"
        return Piece(ident, name, run.id, file, begin, end - given, ds[held], values[held])

    try:
        for block in blocks:
            more = _parse(file, run.first + front + len(ds), ds[-1:], block, of.freq)
            ds, values = np.concatenate([ds, more[0]]), np.concatenate([values, more[1]])
            while given + length <= front + len(ds):
                yield piece(given)
                given += length
            kept = max(0, given - length - front)
            # Copies, for a view would hold the block.
            ds, values, front = ds[kept:].copy(), values[kept:].copy(), front + kept
    except DataError as error:
        left = f"; the series' rows from {given} on are left out" if given else ""
        yield Broken(f"{name}[{given}:]" if given else name, f"{error}{left}")
        return
    rows = front + len(ds)
    if rows < length:
        yield Broken(name, f"{file.name}: too short, {rows} rows; the model needs {length}")
    elif rows > given:
        yield piece(rows - length)


def _parse(file: File, row: int, before: Times, block: pa.Table, freq: str) -> tuple[Times, Floats]:
    """Read a block's cells, and check that its timestamps go on from those before."""

    def where(i: int) -> str:
        return file.where(row + i)

    layout = file.layout
    ds = tables.parse_times(block[layout.time], layout.time, where)
    check_times(np.concatenate([before, ds]), freq, lambda i: where(i - len(before)))
    columns = [tables.parse_numbers(block[c], c, where) for c in layout.targets]
    return ds, np.stack(columns, axis=1)


def check(record: Piece | Broken, of: Preprocessing) -> Piece:
    """Refuse what could not be read, and missing values where they are refused.

    Raises:
        BadRecord: What is wrong.
    """
    if isinstance(record, Broken):
        raise BadRecord(record.reason)
    if of.missing == "refuse":
        try:
            check_missing(
                record.values, record.file.layout.targets, lambda i: f"{record.id}, {record.ds[i].item()}"
            )
        except DataError as error:
            raise BadRecord(str(error)) from None
    return record


def prepare(piece: Piece, of: Preprocessing) -> Sample:
    """Scale a window as the train data were; a column that these had not, by the window itself."""
    mean, scale = of.treatment.statistics(piece.series, piece.file.layout.targets, piece.values)
    scaled = torch.from_numpy((piece.values - mean) / scale).float()
    marks = torch.from_numpy(time_features(piece.ds, of.freq))
    return Sample(scaled.nan_to_num(nan=0.0), ~scaled.isnan(), marks, mean, scale)


def collate(samples: Sequence[Sample]) -> list[Group]:
    """Stack samples; those with another number of columns form another group."""
    widths = [sample.x.shape[1] for sample in samples]
    groups = [[i for i, width in enumerate(widths) if width == n] for n in sorted(set(widths))]
    return [
        Group(
            tuple(group),
            *(torch.stack([getattr(samples[i], key) for i in group]) for key in ("x", "observed", "x_mark")),
        )
        for group in groups
    ]
