"""What a test of a graph model leaves beside its figures: each row, the figures by column, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manyheads.graph import metrics
from manyheads.graph.losses import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ROWS, COLUMNS, PICTURE = "rows.csv", "columns.csv", "picture.png"
SHOWN = 12  # columns in the picture, and lines that are printed
_CLASSES = 30  # classes of a picture that can still be read


@dataclass(frozen=True)
class Tested:
    """A tested part.

    Args:
        kind: What the targets are.
        ids: Names of the rows.
        names: Names of the targets.
        classes: Names of the classes; empty where there are none.
        values: What is predicted: numbers in the data's units, else chances.
        target: What is true; NaN is unknown.

    Shape:
        values `[R, outputs]`; target `[R, targets]`.
    """

    kind: Kind
    ids: Sequence[str]
    names: Sequence[str]
    classes: Sequence[str]
    values: Tensor
    target: Tensor

    def write(self, folder: Path) -> list[str]:
        """Write a line a row, a line a column or class, and the picture.

        Returns:
            Lines to print.
        """
        self.rows().to_csv(folder / ROWS, index=False)
        table = self.table()
        table.to_csv(folder / COLUMNS, index=False)
        draw = {"regression": self._scatter, "classification": self._confusion, "multilabel": self._curves}
        draw[self.kind]().savefig(folder / PICTURE, dpi=120)
        lines = table.head(SHOWN).to_string(index=False, float_format="{:.4f}".format).splitlines()
        if len(table) > SHOWN:
            lines.append(f"and {len(table) - SHOWN} more")
        return [*lines, f"in {folder}: {ROWS}, {COLUMNS}, {PICTURE}"]

    def rows(self) -> DataFrame:
        """Return each row's name, what is true and what is predicted."""
        import pandas as pd

        found: dict[str, object] = {"id": list(self.ids)}
        if self.kind == "classification":
            true, (chance, guessed) = self.target[:, 0], self.values.max(-1)
            found["true"] = ["" if math.isnan(t) else self.classes[int(t)] for t in true.tolist()]
            found["predicted"] = [self.classes[i] for i in guessed.tolist()]
            found["probability"] = chance.tolist()
        else:
            for i, name in enumerate(self.names):
                found[name], found[f"{name}_predicted"] = self.target[:, i], self.values[:, i]
        return pd.DataFrame(found)

    def table(self) -> DataFrame:
        """Return the figures of each column, or of each class."""
        import pandas as pd

        if self.kind == "classification":
            counts = metrics.confusion(self.values, self.target[:, 0])
            rows = [{"class": n, **f} for n, f in zip(self.classes, metrics.of_classes(counts), strict=True)]
        else:
            measure = metrics.of_regression if self.kind == "regression" else metrics.of_multilabel
            found = measure(self.values, self.target)
            rows = [{"target": n, **f} for n, f in zip(self.names, found, strict=True)]
        table = pd.DataFrame(rows)
        return table.astype({name: int for name in ("positives", "rows") if name in table})

    def _grid(self) -> tuple[Figure, list[object]]:
        from matplotlib.figure import Figure

        count = min(len(self.names), SHOWN)
        width = min(4, count)
        figure = Figure(figsize=(3.4 * width + 1, 3.2 * -(-count // width) + 0.4), layout="constrained")
        axes = figure.subplots(-(-count // width), width, squeeze=False).flatten()
        for axis in axes[count:]:
            axis.set_visible(False)
        return figure, list(axes[:count])

    def _scatter(self) -> Figure:
        """Predicted against true, a panel a target."""
        figure, axes = self._grid()
        for axis, name, mine, true in zip(axes, self.names, self.values.T, self.target.T, strict=False):
            known = ~true.isnan()
            axis.scatter(true[known], mine[known], s=6, alpha=0.5, linewidths=0)  # type: ignore[attr-defined]
            both = torch.cat([true[known], mine[known]])
            if len(both):
                ends = [float(both.min()), float(both.max())]
                axis.plot(ends, ends, color="grey", linewidth=1)  # type: ignore[attr-defined]
            axis.set(xlabel=f"{name}, true", ylabel="predicted")  # type: ignore[attr-defined]
            axis.grid(alpha=0.3)  # type: ignore[attr-defined]
        return figure

    def _curves(self) -> Figure:
        """Share of positives found against share of false alarms, a panel a label."""
        from torchmetrics.functional.classification import binary_roc

        figure, axes = self._grid()
        for axis, name, mine, true in zip(axes, self.names, self.values.T, self.target.T, strict=False):
            known = ~true.isnan()
            truth = true[known].long()
            axis.plot([0, 1], [0, 1], color="grey", linewidth=1)  # type: ignore[attr-defined]
            if 0 < int(truth.sum()) < len(truth):
                false, found, _ = binary_roc(mine[known].contiguous(), truth)
                axis.plot(false, found)  # type: ignore[attr-defined]
            axis.set(xlabel="false positives", ylabel="true positives", title=name)  # type: ignore[attr-defined]
            axis.grid(alpha=0.3)  # type: ignore[attr-defined]
        return figure

    def _confusion(self) -> Figure:
        """True classes by predicted ones, as shares of the true ones."""
        from matplotlib.figure import Figure

        counts = metrics.confusion(self.values, self.target[:, 0])
        size = 2.5 + 0.45 * min(len(self.classes), _CLASSES)
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axis = figure.subplots()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axis.set(xlabel="predicted", ylabel="true")
        if len(self.classes) <= _CLASSES:
            places = range(len(self.classes))
            axis.set_xticks(places, self.classes, rotation=90)
            axis.set_yticks(places, self.classes)
            for i in places:
                for j in places:
                    if counts[i, j]:
                        dark = "white" if shares[i, j] > 0.5 else "black"
                        axis.text(
                            j, i, str(int(counts[i, j])), ha="center", va="center", color=dark, fontsize=8
                        )
        figure.colorbar(picture, label="share of the true class")
        return figure
