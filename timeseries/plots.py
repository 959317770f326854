"""Pictures: forecasts beside history and truth, and which variates attend to which.

Drawn on a canvas of their own, so that no state of matplotlib is read or changed. The colours are those of
Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from manyheads.timeseries.calendar import Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

MOST_PANELS = 8
_HISTORY, _TRUTH, _FORECAST = "0.45", "black", "#D55E00"
_KINDS = {"variate": "black", "calendar": "#0072B2", "covariate": "#D55E00"}


@dataclass(frozen=True)
class Panel:
    """One series of a picture.

    Args:
        name: Its name.
        ds: Timestamps of the history.
        history: Its values.
        ahead: Timestamps of the forecast.
        point: The point forecast.
        quantiles: Quantiles by level.
        truth: What came, where it is known.
    """

    name: str
    ds: Times
    history: Floats
    ahead: Times
    point: Floats
    quantiles: Mapping[float, Floats] = field(default_factory=dict)
    truth: Floats | None = None


def draw_forecasts(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw series one under the other: history, truth, point forecast, and central intervals as bands.

    Args:
        panels: The series.
        path: The picture to write, by its ending.
        title: Stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(1.7 * len(panels), 3.2) + 0.5
    figure = Figure(figsize=(11, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False, sharex=_same_times(panels))[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    figure.align_ylabels()
    handles = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    where: Literal["outside upper right", "outside lower center"]
    where = "outside upper right" if len(handles) <= 4 else "outside lower center"  # beside the title, or not
    figure.legend(list(handles.values()), list(handles), loc=where, ncols=min(len(handles), 8), frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _same_times(panels: Sequence[Panel]) -> bool:
    first = panels[0]
    return all(
        np.array_equal(each.ds, first.ds) and np.array_equal(each.ahead, first.ahead) for each in panels
    )


def _shade(strength: float) -> tuple[float, float, float]:
    """Mix the forecast's colour with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(_FORECAST))
    return red, green, blue


def _draw_panel(axis: Axes, panel: Panel) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    levels = sorted(panel.quantiles)
    bands = [pair for pair in zip(levels, reversed(levels), strict=True) if pair[0] < 0.5 < pair[1]]
    for i, (low, high) in enumerate(bands):  # the widest first, which the others cover
        ends = panel.quantiles[low], panel.quantiles[high]
        shade = _shade(0.2 + 0.4 * i / len(bands))
        label = f"{low:g} to {high:g}"
        axis.fill_between(panel.ahead, *ends, color=shade, linewidth=0, label=label)
    axis.plot(panel.ds, panel.history, color=_HISTORY, label="history")
    if panel.truth is not None:
        axis.plot(panel.ahead, panel.truth, color=_TRUTH, label="truth")
    axis.plot(panel.ahead, panel.point, color=_FORECAST, label="forecast")
    axis.axvline(panel.ahead[0], color="0.8", linewidth=0.8)
    axis.set_ylabel(panel.name if len(panel.name) <= 16 else f"{panel.name[:15]}…")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    locator = AutoDateLocator()
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def draw_attention(weights: Floats, tokens: Sequence[tuple[str, str]], path: Path, title: str) -> None:
    """Draw an attention map: row i says what token i takes from the others, and sums to 1.

    Args:
        weights: The map.
        tokens: Each token's name and kind: "variate", "calendar" or "covariate".
        path: The picture to write, by its ending.
        title: Stands above.

    Shape:
        weights `[T, T]`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    n = len(tokens)
    side = min(max(0.5 * n, 4.0), 16.0)
    figure = Figure(figsize=(side + 2.5, side + 1.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(weights, cmap="cividis", vmin=0)
    size = min(10.0, 9 * side * 8 / max(n, 1))
    axis.set_xticks(range(n), [name for name, _ in tokens], rotation=90, fontsize=size)
    axis.set_yticks(range(n), [name for name, _ in tokens], fontsize=size)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        for label, (_, kind) in zip(labels, tokens, strict=True):
            label.set_color(_KINDS[kind])
    axis.set_xlabel("attended to")
    axis.set_ylabel("token")
    if n <= 16:
        for (i, j), weight in np.ndenumerate(weights):
            ink = "white" if weight < 0.6 * weights.max() else "black"
            axis.text(j, i, f"{weight:.2f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.7, label="weight")
    kinds = dict.fromkeys(kind for _, kind in tokens)
    marks = [Line2D([], [], color=_KINDS[kind], marker="s", linestyle="") for kind in kinds]
    figure.legend(marks, list(kinds), loc="outside lower right", ncols=len(marks), frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
