"""What a test of an image classifier leaves beside its figures: tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from manyheads.vision import metrics
from manyheads.vision.pictures import draw_confusion, draw_reliability

REPORT, CONFUSION = "report.csv", "confusion.csv"
CONFUSION_PICTURE, RELIABILITY_PICTURE = "confusion.png", "reliability.png"


@dataclass(frozen=True)
class Tested:
    """A tested split.

    Args:
        logits: Of all its images.
        target: Their classes, or 0, 1 and NaN (unknown) for each label.
        temperature: What the logits are divided by before they are probabilities.
        labels: Names of the classes.

    Shape:
        logits `[N, K]`, target `[N]` int64 or `[N, K]`.
    """

    logits: Tensor
    target: Tensor
    temperature: float
    labels: tuple[str, ...]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a class."""
        return metrics.by_class(self.logits, self.target, self.labels)

    def write(self, folder: Path) -> list[str]:
        """Write the report by class, the confusion matrix (of one label an image) and the pictures.

        Returns:
            Lines to print.
        """
        self.table.to_csv(folder / REPORT, index=False)
        written = [REPORT]
        if self.target.ndim == 1:
            matrix = metrics.confusion(self.logits, self.target)
            table = pd.DataFrame(matrix, index=pd.Index(self.labels, name="true"), columns=self.labels)
            table.to_csv(folder / CONFUSION)
            draw_confusion(matrix, self.labels, folder / CONFUSION_PICTURE)
            written += [CONFUSION, CONFUSION_PICTURE]
        raw, right = metrics.judged(self.logits, self.target)
        scaled, _ = metrics.judged(self.logits, self.target, self.temperature)
        both = np.stack([raw.numpy(), scaled.numpy()])
        draw_reliability(both, right.numpy(), self.temperature, folder / RELIABILITY_PICTURE)
        written.append(RELIABILITY_PICTURE)
        return [*metrics.lines(self.table), f"in {folder}: {', '.join(written)}"]
