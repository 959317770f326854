"""What is predicted, from the columns of a table: numbers, classes, or labels with gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import numbers, text_of
from manyheads.graph.preprocessing import Preprocessing, Target, TargetKind
from manyheads.graph.splits import Parts

if TYPE_CHECKING:
    import pandas as pd


class Loaded(NamedTuple):
    """A data set.

    Attributes:
        graphs: The graphs, not encoded, with their targets in the data's units.
        parts: "train", "val" and "test": numbers of graphs, or of the nodes of the one graph.
        preprocessing: What the graphs are, and what is predicted; without encodings.
    """

    graphs: GraphSet
    parts: Parts
    preprocessing: Preprocessing


def standardised(names: Sequence[str], y: Tensor) -> Target:
    """Return a regression's target with mean and deviation of the training part's known values.

    Shape:
        y `[rows, targets]`, of the training part.

    Raises:
        DataError: A target is nowhere known.
    """
    mean, std = [], []
    for name, column in zip(names, y.double().T, strict=True):
        known = column[~column.isnan()]
        if not len(known):
            raise DataError(f"target {name!r} has no number in the training part")
        mean.append(float(known.mean()))
        std.append(float(known.std(unbiased=False)) or 1.0)  # targets all alike stay as they are
    return Target("regression", tuple(names), None, tuple(mean), tuple(std))


@dataclass(frozen=True)
class Labels:
    """Columns of a table that say what is to be predicted.

    Args:
        names: The columns: several numbers or labels, or one class. Empty cells are unknown.
        kind: "regression", "classification" or "multilabel" (cells are 0 or 1).
        weight: Column of what each row counts in training; all the same if None.
    """

    names: list[str] = field(default_factory=lambda: ["y"])
    kind: TargetKind = "regression"
    weight: str | None = None

    def __post_init__(self) -> None:
        if not self.names or (self.kind == "classification" and len(self.names) > 1):
            raise UsageError(f"graphs: {self.kind} of the columns {self.names}")

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.names, *([self.weight] if self.weight else []))

    def read(self, table: pd.DataFrame, what: str) -> tuple[Tensor, Target]:
        """Return y `[rows, targets]`, NaN where it is unknown, and what it is; without mean and deviation.

        Args:
            table: The rows.
            what: Names the table in errors.

        Raises:
            DataError: A column is not there, is not of numbers, of 0 and 1, or of two classes and more.
        """
        if self.kind == "classification":
            return _classes(table, self.names[0], what)
        y = np.concatenate([numbers(table, name, what) for name in self.names], 1)
        if self.kind == "multilabel" and not np.isin(y[~np.isnan(y)], (0, 1)).all():
            wrong = y[~np.isnan(y) & ~np.isin(y, (0, 1))][0]
            raise DataError(f"{what}: labels are 0, 1 or empty, and there is {wrong:g}")
        return torch.from_numpy(y.astype(np.float32)), Target(self.kind, tuple(self.names))

    def weights(self, table: pd.DataFrame, what: str) -> Tensor | None:
        """Return the rows' weights.

        Raises:
            DataError: A weight is missing, negative or infinite.
        """
        if self.weight is None:
            return None
        found = numbers(table, self.weight, what)[:, 0]
        if not (np.isfinite(found) & (found >= 0)).all():
            raise DataError(
                f"{what}: weights in column {self.weight!r} must be numbers from 0 on, in every row"
            )
        return torch.from_numpy(found.astype(np.float32))


def divided(y: Tensor, divide: Callable[[Tensor], Parts]) -> Parts:
    """Divide the rows of which something is known; the others are in no part.

    Args:
        y: Targets of all rows.
        divide: Gets the numbers of the known rows, and gives the parts among them.

    Raises:
        DataError: Nothing is known of any row.
    """
    known = (~y.isnan()).any(1).nonzero().flatten()
    if not len(known):
        raise DataError("graphs: every target is empty")
    return {name: known[part] for name, part in divide(known).items()}


def _classes(table: pd.DataFrame, name: str, what: str) -> tuple[Tensor, Target]:
    text = text_of(table, name, what)
    kinds = text.dropna().unique().tolist()
    kinds.sort(key=(lambda kind: (int(kind), kind)) if all(map(_whole, kinds)) else None)
    if len(kinds) < 2:
        raise DataError(f"{what}: column {name!r} has {len(kinds)} classes, and two are needed")
    import pandas as pd

    found = pd.Index(kinds).get_indexer(pd.Index(text)).astype(np.float32)
    y = torch.from_numpy(np.where(found < 0, np.nan, found).astype(np.float32))
    return y[:, None], Target("classification", (name,), tuple(kinds))


def _whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
