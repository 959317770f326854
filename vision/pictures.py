"""Pictures: which classes are taken for which, how sure a model is beside how right, and what it looked at.

Drawn on a canvas of their own, so that no state of matplotlib is read or changed. Colours are those of Okabe
and Ito, and maps of one hue or of even lightness, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

BINS = 15
DPI = 110
MOST_COUNTS = 20  # classes up to which each cell has its count
MOST_LABELS = 60  # classes up to which the axes have names; numbers beyond, and the worst mistakes by name
MOST_LISTED = 20
_BEFORE, _AFTER, _QUIET = "#D55E00", "#0072B2", "0.45"
_LONGEST = 24  # letters of a label


def draw_confusion(matrix: NDArray[Any], labels: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix: each row in shares of its class, the counts written where they fit.

    Args:
        matrix: How many images of class i (row) were taken for class j (column).
        labels: The classes' names.
        path: The picture to write, by its ending.

    Shape:
        matrix `[K, K]`, K up to thousands.

    Raises:
        ValueError: The matrix is not square, is empty, or has not as many rows as there are labels.
    """
    confusion_figure(np.asarray(matrix), labels).savefig(path, dpi=DPI)


def confusion_figure(matrix: NDArray[Any], labels: Sequence[str]) -> Figure:
    """Return the figure of `draw_confusion`."""
    from matplotlib.colors import PowerNorm

    n, total = len(labels), matrix.sum()
    if matrix.shape != (n, n):
        raise ValueError(f"draw_confusion: {n} labels need a matrix [{n}, {n}], not {list(matrix.shape)}")
    if not total > 0:
        raise ValueError("draw_confusion: the matrix counts nothing")
    rows = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, rows, out=np.full((n, n), np.nan), where=rows > 0)
    side = float(np.clip(0.5 * n, 4.0, 10.0))
    numbered = n > MOST_LABELS
    figure = _figure(side + (6.5 if numbered else 3.0), side + 1.6)
    axis, beside = figure.subplots(1, 2, width_ratios=(side, 3.5)) if numbered else (figure.subplots(), None)
    axis.set_facecolor("0.85")  # rows of classes without images
    norm = PowerNorm(0.5, 0, 1)  # rare mistakes can be seen too
    image = axis.imshow(_grown(shares, n // 400), cmap="Blues", norm=norm, interpolation="none")
    _name_classes(axis, labels, cell=72 * side / n)
    if n <= MOST_COUNTS:
        _write_counts(axis, matrix, np.nan_to_num(np.ma.filled(norm(shares), 0.0)), cell=72 * side / n)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axis, shrink=0.7, label="share of the true class")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    if beside is not None:
        _list_mistakes(beside, matrix, shares, labels)
    title = f"accuracy {np.trace(matrix) / total:.4f} of {_count(total)} images, {n} classes"
    empty = int((rows == 0).sum())
    if empty:
        title += f"\ngrey: {empty} without images"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _short(text: str, longest: int = _LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _count(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.3g}"


def _name_classes(axis: Axes, labels: Sequence[str], cell: float) -> None:
    """Write the classes' names along both axes, or some of their numbers where names would not fit.

    Args:
        cell: A cell's side in points.
    """
    from matplotlib.ticker import MaxNLocator

    if len(labels) > MOST_LABELS:
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(10, integer=True))
        return
    names = [_short(label) for label in labels]
    size = min(10.0, 0.8 * cell)
    wide = max(map(len, names)) * 0.65 * size > 0.95 * cell
    places = range(len(names))
    axis.set_xticks(places, names, rotation=90 if wide else 0, fontsize=size, parse_math=False)
    axis.set_yticks(places, names, fontsize=size, parse_math=False)


def _write_counts(axis: Axes, matrix: NDArray[Any], depth: Floats, cell: float) -> None:
    texts = {place: _count(value) for place, value in np.ndenumerate(matrix) if value}
    size = min(9.0, cell / (0.72 * max(map(len, texts.values()))))
    for (i, j), text in texts.items():
        ink = "white" if depth[i, j] > 0.6 else "black"
        axis.text(j, i, text, ha="center", va="center", color=ink, fontsize=size)


def _grown(shares: Floats, cells: int) -> Floats:
    """Let each cell cover so many neighbours that are smaller: one cell of a thousand could not be seen."""
    unknown = np.isnan(shares)
    for axis in (0, 1):
        wide = np.pad(shares, [(cells, cells) if i == axis else (0, 0) for i in (0, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * cells + 1, axis=axis)
        shares = np.fmax.reduce(windows, axis=-1)  # the other number where one is NaN
    return np.where(unknown, np.nan, shares)


def _list_mistakes(axis: Axes, matrix: NDArray[Any], shares: Floats, labels: Sequence[str]) -> None:
    """Write the mistakes that were made most often, by their share of the true class."""
    axis.set_axis_off()
    wrong = np.nan_to_num(shares).copy()
    np.fill_diagonal(wrong, 0)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MOST_LISTED]
    axis.text(0, 1, "most frequent mistakes", va="top", fontsize=11)
    for k, (i, j) in enumerate(zip(*np.unravel_index(worst, wrong.shape), strict=True)):
        if not wrong[i, j]:
            break
        true, taken = (_numbered(labels[each], each) for each in (i, j))
        text = f"{wrong[i, j]:.0%} of {true}\n      taken for {taken}"
        axis.text(0, 0.96 - k * 0.96 / MOST_LISTED, text, va="top", fontsize=9, parse_math=False)


def _numbered(label: str, number: int) -> str:
    return label if label == str(number) else f"{_short(label)} ({number})"


def calibration_bins(confidences: Floats, correct: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Return each bin's share of the predictions, its mean confidence and its accuracy (NaN where empty).

    Shape:
        confidences and correct `[N]`; the results `[BINS]`.
    """
    which = np.clip((confidences * BINS).astype(np.int64), 0, BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    means = [
        np.divide(
            np.bincount(which, weights=values, minlength=BINS),
            counts,
            out=np.full(BINS, np.nan),
            where=counts > 0,
        )
        for values in (confidences, correct)
    ]
    return counts / max(len(confidences), 1), means[0], means[1]


def calibration_error(confidences: Floats, correct: NDArray[Any]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over bins.

    Source:
        Guo et al. 2017, arXiv 1706.04599, section 2; 15 bins of equal width.
    """
    shares, confidence, accuracy = calibration_bins(confidences, correct)
    return float(np.nansum(shares * np.abs(confidence - accuracy)))


def draw_reliability(
    confidences: Floats, correct: NDArray[Any], temperature: float | None, path: Path
) -> None:
    """Draw accuracy over confidence, with the calibration error, above a histogram of the confidences.

    Args:
        confidences: The probability of each prediction; two rows are those before and after scaling by
            the temperature.
        correct: Whether the predictions were right; scaling changes none of them.
        temperature: What the logits were divided by, for the legend; None where nothing was scaled.
        path: The picture to write, by its ending.

    Shape:
        confidences `[N]` or `[2, N]`, correct `[N]`.

    Raises:
        ValueError: No predictions, shapes that do not fit, or confidences outside of 0 to 1.
    """
    reliability_figure(confidences, correct, temperature).savefig(path, dpi=DPI)


def reliability_figure(confidences: Floats, correct: NDArray[Any], temperature: float | None) -> Figure:
    """Return the figure of `draw_reliability`."""
    given = np.atleast_2d(np.asarray(confidences, dtype=np.float64))
    right = np.asarray(correct, dtype=np.float64)
    if len(given) not in (1, 2) or given.shape[1:] != right.shape or not right.size:
        raise ValueError(
            f"draw_reliability: confidences [N] or [2, N] and correct [N], not {list(np.shape(confidences))}"
            f" and {list(np.shape(correct))}"
        )
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError("draw_reliability: confidences lie between 0 and 1")
    scaled = "" if temperature is None else f"temperature {temperature:.3g}"
    names = [scaled or "confidences"] if len(given) == 1 else ["before", f"after, {scaled}".rstrip(", ")]
    colours = (_AFTER,) if len(given) == 1 else (_BEFORE, _AFTER)
    figure = _figure(6.4, 7.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=_QUIET, linestyle="--", linewidth=1, label="as sure as right")
    width = 0.94 / BINS / len(given)
    for i, (row, name, colour) in enumerate(zip(given, names, colours, strict=True)):
        shares, _, accuracy = calibration_bins(row, right)
        left = (np.arange(BINS) + 0.03) / BINS + i * width
        error = calibration_error(row, right)
        top.bar(
            left,
            np.nan_to_num(accuracy),
            width,
            align="edge",
            color=colour,
            label=f"{name}: ECE {error:.4f}",
            zorder=2,
        )
        bottom.bar(left, shares, width, align="edge", color=colour)
        for axis, mean in ((top, row.mean()), (bottom, row.mean())):
            axis.axvline(mean, color=colour, linewidth=1, linestyle=":", zorder=3)
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    bottom.set(xlabel="confidence (dotted: its mean)", ylabel="share of images")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle(f"accuracy {right.mean():.4f} of {right.size:,} predictions", x=0.01, ha="left")
    return figure


def overlay(photo: Pixels, heat: Floats) -> Pixels:
    """Lay a map over a photo: colour where the map is high, the photo in grey where it is low.

    Shape:
        photo `[H, W, 3]`, heat `[H, W]` in 0 to 1; the result `[H, W, 3]`.
    """
    from matplotlib import colormaps

    grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    colour = colormaps["inferno"](heat)[..., :3]
    strength = 0.25 + 0.5 * heat[..., None]
    return np.round(255 * ((1 - strength) * grey + strength * colour)).astype(np.uint8)


def draw_explanation(
    photo: Pixels, heat: Floats, top: Sequence[tuple[str, float]], path: Path, title: str, subtitle: str
) -> None:
    """Draw a photo, the photo under its map, and the likeliest classes as bars.

    Args:
        photo: The pixels that the model saw.
        heat: What it looked at, in 0 to 1.
        top: Labels and probabilities, the likeliest first.
        path: The picture to write, by its ending.
        title: Stands above the photo: the file.
        subtitle: Stands above the map: the method and what it explains.

    Shape:
        photo `[H, W, 3]`, heat `[H, W]`.
    """
    explanation_figure(photo, heat, top, title, subtitle).savefig(path, dpi=DPI)


def explanation_figure(
    photo: Pixels, heat: Floats, top: Sequence[tuple[str, float]], title: str, subtitle: str
) -> Figure:
    """Return the figure of `draw_explanation`."""
    height, width = heat.shape
    inches = 3.6
    panel = max(inches * min(width / height, 2.0), 2.0)
    figure = _figure(2 * panel + 3.9, inches + 0.5 + 0.3 * max(len(top) - 8, 0))
    left, middle, right = figure.subplots(1, 3, width_ratios=(panel, panel, 3.0))
    for axis, pixels, above in ((left, photo, title), (middle, overlay(photo, heat), subtitle)):
        axis.imshow(pixels)
        axis.set_axis_off()
        axis.set_title(_short(above, int(11 * panel)), fontsize=10, parse_math=False)
    places = np.arange(len(top))
    right.barh(places, [share for _, share in top], height=0.55, color=_AFTER)
    for place, (label, share) in zip(places, top, strict=True):
        right.text(0.01, place - 0.32, f"{_short(label, 34)}  {share:.3f}", fontsize=9, parse_math=False)
    right.set(xlim=(0, 1), ylim=(max(len(top), 3) - 0.4, -0.8), xlabel="probability")
    right.set_yticks([])
    right.spines[["top", "right"]].set_visible(False)
    return figure
