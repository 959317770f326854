"""From a model's outputs to the rows of a job: numbers in the data's units, labels, probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.predictor import Row
from manyheads.graph.preprocessing import Target

OutputKind: TypeAlias = Literal["label", "probabilities"]
KINDS: tuple[OutputKind, ...] = get_args(OutputKind)


@dataclass(frozen=True)
class Answers:
    """What rows are made of, beside the id.

    Args:
        target: What the model predicts. Regression: a column a name, in the data's units. Multilabel: a
            column a name, its probability. Classification: `label` and `probability`.
        kind: Of a classification, "probabilities" adds a column `probability_CLASS` for each class.

    Raises:
        DataError: Names of the model folder cannot be those of columns.
        UsageError: There is no such kind, or the model is no classifier.
    """

    target: Target
    kind: OutputKind = "label"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            close = did_you_mean(str(self.kind), KINDS)
            raise UsageError(f"no output kind {self.kind!r}{close} (kinds: {', '.join(KINDS)})")
        if self.kind == "probabilities" and self.target.classes is None:
            raise UsageError(f"--output-kind probabilities is for classes; this model's are {self._what}")
        names = ["id", *self._names]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise DataError(f"the model folder's targets make two columns {double!r} of a row")
        for mean, std in zip(self.target.mean or (), self.target.std or (), strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise DataError(f"the model folder's target has the mean {mean} and the deviation {std}")

    @property
    def _what(self) -> str:
        return "numbers" if self.target.kind == "regression" else "labels, each with its own probability"

    @property
    def _names(self) -> list[str]:
        if self.target.classes is None:
            return list(self.target.names)
        each = self.target.classes if self.kind == "probabilities" else ()
        return ["label", "probability", *(f"probability_{name}" for name in each)]

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a row and their Arrow types."""
        return {name: "string" if name in ("id", "label") else "float32" for name in ("id", *self._names)}

    def rows(self, outputs: Tensor, ids: Sequence[str]) -> list[Row]:
        """Make rows.

        Shape:
            outputs `[R, outputs]`.

        Raises:
            DataError: The model gives another number of outputs, or no finite number.
        """
        if outputs.shape != (len(ids), self.target.outputs):
            wanted = [len(ids), self.target.outputs]
            raise DataError(f"the model gives {list(outputs.shape)} numbers, its folder says {wanted}")
        if not bool(outputs.isfinite().all()):
            row = int((~outputs.isfinite()).any(1).nonzero()[0])
            raise DataError(f"the model gives no finite number for {ids[row]!r}: its weights are damaged")
        values = self._values(outputs.double())
        columns = list(self.columns)
        if self.target.classes is None:
            return [dict(zip(columns, (id, *row), strict=True)) for id, row in zip(ids, values, strict=True)]
        best = values.argmax(1)
        shown = values if self.kind == "probabilities" else values[:, :0]
        found = []
        for row, (id, k, rest) in enumerate(zip(ids, best.tolist(), shown.tolist(), strict=True)):
            cells = (id, self.target.classes[k], float(values[row, k]), *rest)
            found.append(dict(zip(columns, cells, strict=True)))
        return found

    def _values(self, outputs: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        of = self.target
        if of.kind == "classification":
            return outputs.softmax(1).numpy()
        if of.kind == "multilabel":
            return outputs.sigmoid().numpy()
        if of.mean is not None and of.std is not None:
            outputs = outputs * torch.tensor(of.std).double() + torch.tensor(of.mean).double()
        return outputs.numpy()
