"""The picture of a training: what its CSV log says, by epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from manyheads.core.errors import did_you_mean

log = logging.getLogger(__name__)


def read_log(folder: Path) -> pd.DataFrame:
    """Return a run's figures by epoch, from 1 on; where pieces of a resumed run overlap, the later one holds.

    Args:
        folder: Of CSVLogger's `version_*/metrics.csv`.
    """
    logs = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    parts = [pd.read_csv(log) for log in logs if log.stat().st_size > 1]
    if not parts or not any("epoch" in part for part in parts):
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True).groupby("epoch").last().drop(columns="step", errors="ignore")
    table.index = table.index.astype(int) + 1
    return table.dropna(axis="columns", how="all")


def draw_curves(folder: Path, path: Path, reference: Mapping[str, float] | None = None) -> None:
    """Draw a run's losses, and beside them what was measured in validation alone.

    Args:
        folder: Of the CSV log.
        path: The picture to write.
        reference: Values to mark beside curves, by the figure's name; one without a curve is told about.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    table = read_log(folder)
    losses = [name for name in ("train_loss", "val_loss") if name in table]
    measured = [name.removeprefix("val_") for name in map(str, table.columns) if name.startswith("val_")]
    others = [f"val_{name}" for name in measured if f"train_{name}" not in table and name != "loss"]
    panels = [names for names in (losses, others) if names]
    if not panels:
        return
    drawn = [name for names in panels for name in names]
    marked = dict(reference or {})
    for name in marked:
        if name not in drawn:  # a trained run does not fail for this
            log.warning("reference: no curve of %r%s", name, did_you_mean(name, drawn))
    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            curve = table[name].dropna()
            (line,) = axes.plot(curve.index, curve, marker="." if len(curve) < 30 else None, label=name)
            if name in marked:
                text = f"{name} {marked[name]:g}, for comparison"
                axes.axhline(marked[name], color=line.get_color(), linestyle="--", linewidth=1, label=text)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
