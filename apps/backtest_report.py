"""A backtest's folder and table: by series and overall, a row a window, a picture of the last ones."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from manyheads.core import files
from manyheads.core.errors import UsageError
from manyheads.timeseries.backtest import Answer
from manyheads.timeseries.frames import Series
from manyheads.timeseries.layout import Layout
from manyheads.timeseries.metrics import SeriesSums
from manyheads.timeseries.plots import MOST_PANELS, Panel, draw_forecasts

RESULTS, SERIES, WINDOWS, PICTURE = "backtest.json", "backtest.csv", "windows.csv", "backtest.png"
SHOWN = 12  # series in the table on a terminal
UNITS = {
    "scaled": "mse_scaled, mae_scaled, width_scaled: of values divided by the scale of the train data",
    "own": "mse, mae, width: in the units of the file's columns; overall they mix these",
    "none": "mase, smape (0 to 2), wql, below, coverage: ratios of values in own units",
}

Figures = dict[str, object]


def check_free(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier backtest, before the work begins.

    Raises:
        UsageError: It is a file, or has other files.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} is a file: choose a folder with -o")
    if not {file.name for file in output.iterdir()} <= {RESULTS, SERIES, WINDOWS, PICTURE}:
        raise UsageError(f"{output} holds other files than a backtest's: choose another folder with -o")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into; it gets its name at the end, or is removed if there is none."""
    written = files.temporary(output)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        files.replace_folder(written, output)
    finally:
        shutil.rmtree(written, ignore_errors=True)


@dataclass(frozen=True)
class Tested:
    """What was tested, as far as a report names it.

    Args:
        series: The series.
        layout: What their file's columns are.
        seq_len: Rows known in a window.
        pred_len: Rows forecast.
    """

    series: Sequence[Series]
    layout: Layout
    seq_len: int
    pred_len: int

    def names(self, i: int) -> list[str]:
        """Return the `unique_id` of each column of a series, as forecasts have it."""
        columns, ident = self.series[i].columns, self.series[i].id
        if self.layout.id is None:
            return list(columns)
        return [ident] if len(columns) == 1 else [f"{ident}/{column}" for column in columns]


class Record:
    """Takes every window's forecast: adds it to the sums, writes its row, keeps the last ones for a picture.

    Args:
        tested: What is tested.
        sums: The sums.
        stream: Where the rows go.
    """

    def __init__(self, tested: Tested, sums: SeriesSums, stream: TextIO) -> None:
        self.tested, self.sums = tested, sums
        self._writer = csv.writer(stream, lineterminator="\n")
        shares = [f"coverage_{coverage:g}" for coverage in _coverages(sums)]
        self._writer.writerow(["unique_id", "ds", "targets", "mse_scaled", "mae_scaled", *shares])
        self._last: dict[int, Answer] = {}

    def add(self, answer: Answer) -> None:
        """Take a batch."""
        self.sums.add(answer.point, answer.quantiles, answer.y, answer.series)
        there = ~answer.y.isnan()
        error = (answer.y - answer.point) / self.sums.unit[answer.series][:, None]
        parts = [error.square(), error.abs()]
        if answer.quantiles is not None:
            for low, high in self.sums.intervals:
                ends = answer.quantiles[..., low], answer.quantiles[..., high]
                parts.append(((answer.y >= ends[0]) & (answer.y <= ends[1])).double())
        count = there.sum(dim=(1, 2))
        means = torch.stack([torch.where(there, part, 0.0).sum(dim=(1, 2)) / count for part in parts], dim=1)
        rows = zip(answer.series.tolist(), answer.rows.tolist(), count.tolist(), means.tolist(), strict=True)
        for i, (series, row, targets, figures) in enumerate(rows):
            of = self.tested.series[series]
            texts = ["" if math.isnan(figure) else f"{figure:.6g}" for figure in figures]
            self._writer.writerow([of.id, of.ds[row].item().isoformat(sep=" "), targets, *texts])
            if series < MOST_PANELS:
                self._last[series] = answer.at(i)

    def draw(self, path: Path, title: str) -> None:
        """Draw the last window of the first series."""
        levels = self.sums.levels
        panels = [
            panel for i in sorted(self._last) for panel in panels_of(self.tested, i, self._last[i], levels)
        ]
        draw_forecasts(panels[:MOST_PANELS], path, title)


def panels_of(tested: Tested, i: int, one: Answer, levels: Sequence[float]) -> Iterator[Panel]:
    """Make the panels of one window of a series, with twice the model's history.

    Args:
        tested: Names what is drawn.
        i: The series.
        one: The window's forecast, as a batch of one.
        levels: Levels of its quantiles.
    """
    series, row = tested.series[i], int(one.rows[0])
    known, ahead = slice(max(0, row - 2 * tested.seq_len), row), slice(row, row + tested.pred_len)
    for j, name in enumerate(tested.names(i)):
        fan = (
            {} if one.quantiles is None else dict(zip(levels, one.quantiles[0, :, j].T.numpy(), strict=True))
        )
        yield Panel(
            name,
            series.ds[known],
            series.values[known, j],
            series.ds[ahead],
            one.point[0, :, j].numpy(),
            fan,
            one.y[0, :, j].numpy(),
        )


def _coverages(sums: SeriesSums) -> list[float]:
    return [round(sums.levels[high] - sums.levels[low], 9) for low, high in sums.intervals]


def _plain(figures: Mapping[str, Tensor], sums: SeriesSums) -> Figures:
    """Return figures by name; those of levels and intervals by name and number, NaN as None."""
    names = {"below": sums.levels}
    made: Figures = {}
    for name, value in figures.items():
        if value.ndim == 0:
            made[name] = int(value) if name == "targets" else _number(value)
            continue
        for number, each in zip(names.get(name, _coverages(sums)), value, strict=True):
            made[f"{name}_{number:g}"] = _number(each)
    return made if sums.levels else {name: value for name, value in made.items() if name != "wql"}


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def results(tested: Tested, sums: SeriesSums) -> tuple[Figures, list[Figures]]:
    """Return the figures overall, and by series."""
    by_series = sums.by_series()
    rows: list[Figures] = []
    for i in range(len(tested.series)):
        for j, name in enumerate(tested.names(i)):
            figures = _plain({key: value[i, j] for key, value in by_series.items()}, sums)
            rows.append({"unique_id": name, "windows": int(sums.windows[i]), **figures})
    return _plain(sums.overall(), sums), rows


def write_series(path: Path, rows: Sequence[Figures]) -> None:
    """Write the figures by series as CSV."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


_HEADS = {"mse_scaled": "scaled MSE", "mae_scaled": "scaled MAE"}
_HEADS |= {"mse": "MSE", "mae": "MAE", "mase": "MASE", "smape": "sMAPE", "wql": "WQL"}


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"


def table(rows: Sequence[tuple[str, Figures]]) -> list[str]:
    """Lay figures out, a line a series under a head line."""
    keys = [key for key in (*_HEADS, *rows[0][1]) if key in rows[0][1]]
    shown = [key for key in dict.fromkeys(keys) if key in _HEADS or key.startswith(("coverage_", "width_0"))]
    heads = ["", *(_HEADS.get(key) or _interval_head(key) for key in shown)]
    lines = [heads, *([name, *(_cell(figures[key]) for key in shown)] for name, figures in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    widths[0] = min(widths[0], 32)
    return [
        "  ".join([line[0][: widths[0]].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def _interval_head(key: str) -> str:
    kind, number = key.split("_")
    return f"{'in' if kind == 'coverage' else 'width of'} {float(number):.4g}"


def text(found: Mapping[str, object], output: Path) -> str:
    """Return what is printed: what was tested, ours beside the published figure, and the table."""
    overall, rows = found["overall"], found["series"]
    assert isinstance(overall, dict)
    assert isinstance(rows, list)
    refit = f", trained again every {found['refit']} windows" if found["refit"] else ""
    lines = [
        f"{found['model']} on {found['dataset']}: {found['seq_len']} rows -> the next {found['pred_len']}",
        f"{found['windows']} windows, {found['step']} row{'s' if found['step'] != 1 else ''} apart{refit};"
        f" seed {found['seed']}; season of MASE {found['season']}",
        "",
    ]
    head = f"{'all targets, scaled units':30} {'MSE':>8} {'MAE':>8}"
    lines += [head, f"{'this model':30} {overall['mse_scaled']:8.4f} {overall['mae_scaled']:8.4f}"]
    published = found["published"]
    if isinstance(published, dict):
        lines += [f"{'published':30} {published['mse']:8.3f} {published['mae']:8.3f}   {published['source']}"]
    shown = rows
    if len(rows) > SHOWN:
        shown = sorted(rows, key=lambda row: -(row["mase"] or 0.0))[:SHOWN]
    lines += ["", *table([*((row["unique_id"], row) for row in shown), ("all", overall)])]
    if len(rows) > SHOWN:
        lines += [f"(the {SHOWN} series of {len(rows)} with the largest MASE; {SERIES} has all)"]
    lines += ["", f"{output}/: {RESULTS}  {SERIES}  {WINDOWS}  {PICTURE}"]
    return "\n".join(lines)
