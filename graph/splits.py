"""Training, validation and test parts: numbers of graphs, or of the nodes of one graph."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.graph.molecules import parse, rdkit

log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "val", "test"]
Parts: TypeAlias = "dict[Part, Tensor]"
PARTS: tuple[Part, ...] = ("train", "val", "test")
SplitKind: TypeAlias = Literal["standard", "random", "scaffold", "folds", "column"]
WORDS: dict[str, Part] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """How rows are divided.

    Args:
        kind: "standard", the data set's own; "random"; "scaffold", molecules by their ring systems; "folds",
            of which one is the test part and the next one the validation part; "column" of a table, that
            says train, val or test.
        fractions: Of training, validation and test, for "random" and "scaffold".
        folds: How many folds there are.
        fold: The test part's, from 0.
        column: The table's column.
        seed: Of "random" and "folds".
    """

    kind: SplitKind = "standard"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    folds: int = 10
    fold: int = 0
    column: str = "split"
    seed: int = 0

    def divide(
        self,
        rows: int,
        *,
        classes: Tensor | None = None,
        smiles: Sequence[str] | None = None,
        words: Iterable[object] | None = None,
    ) -> Parts:
        """Divide rows; "standard" is not known here.

        Args:
            rows: How many.
            classes: Each row's class, for folds that have as many of each.
            smiles: Each row's, for "scaffold".
            words: Each row's cell of the column, for "column".

        Raises:
            UsageError: What the kind of split needs is not there.
            DataError: A part would be empty, or a cell says something else.
        """
        if self.kind == "random":
            return random(rows, self.fractions, self.seed)
        if self.kind == "folds":
            return fold_parts(folds(rows, self.folds, self.seed, classes), self.fold)
        if self.kind == "scaffold" and smiles is not None:
            return by_scaffold(scaffolds(smiles), self.fractions)
        if self.kind == "column" and words is not None:
            return by_column(words, self.column)
        raise UsageError(f"split {self.kind!r} cannot be had of these data")


def random(rows: int, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Parts:
    """Divide by chance.

    Raises:
        UsageError: The fractions are no three positive numbers that make 1.
        DataError: A part would be empty.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    first, second = _cuts(rows, fractions)
    parts = (order[:first], order[first:second], order[second:])
    return _checked({name: part.sort().values for name, part in zip(PARTS, parts, strict=True)})


def _cuts(rows: int, fractions: Sequence[float]) -> tuple[int, int]:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"a split's fractions are three numbers that make 1, not {list(fractions)}")
    return int(fractions[0] * rows + 1e-6), int((fractions[0] + fractions[1]) * rows + 1e-6)


def scaffolds(smiles: Sequence[str]) -> list[str]:
    """Return the Bemis-Murcko scaffold of each molecule: its rings and what links them, "" without rings.

    Raises:
        BadRecord: A SMILES cannot be read.
        UsageError: rdkit is not installed.
    """
    rdkit()
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    found, told = [], time.monotonic()
    for i, text in enumerate(smiles):
        found.append(MurckoScaffoldSmiles(mol=parse(text), includeChirality=False))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            log.info("scaffolds: %s of %s molecules", f"{i + 1:,}", f"{len(smiles):,}")
    return found


def by_scaffold(names: Sequence[str], fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> Parts:
    """Divide molecules so that those of one scaffold are in one part: the most frequent ones in training.

    Args:
        names: Each molecule's scaffold.
        fractions: Of training, validation and test; parts are at most as large, the test part takes the rest.

    Raises:
        UsageError: The fractions are no three positive numbers that make 1.
        DataError: A part would be empty.

    Source:
        Wu et al. 2018, arXiv 1703.00564 (as deepchem and OGB divide).
    """
    groups = defaultdict(list)
    for i, name in enumerate(names):
        groups[name].append(i)
    first, second = _cuts(len(names), fractions)
    train: list[int] = []
    val: list[int] = []
    test: list[int] = []
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True):
        if len(train) + len(group) <= first:
            train += group
        elif len(train) + len(val) + len(group) <= second:
            val += group
        else:
            test += group
    parts = zip(PARTS, (train, val, test), strict=True)
    return _checked({name: torch.tensor(sorted(part), dtype=torch.int64) for name, part in parts})


def folds(rows: int, count: int, seed: int = 0, classes: Tensor | None = None) -> Tensor:
    """Give each row a fold, from 0; folds differ by at most one row, and by at most one of each class.

    Raises:
        UsageError: There are fewer than three folds, or fewer rows than folds.

    Shape:
        classes `[rows]`; the result `[rows]` int64.
    """
    if not 3 <= count <= rows:
        raise UsageError(f"{rows} rows cannot be divided into {count} folds (at least 3)")
    order = np.random.default_rng(seed).permutation(rows)
    if classes is not None:
        order = order[np.argsort(classes.numpy()[order], kind="stable")]
    found = np.empty(rows, np.int64)
    found[order] = np.arange(rows) % count
    return torch.from_numpy(found)


def fold_parts(fold_of: Tensor, fold: int) -> Parts:
    """Return the parts of one fold: it is the test part, the next one the validation part.

    Args:
        fold_of: Each row's fold; a negative one is always in training.
        fold: Which, from 0.

    Raises:
        UsageError: There is no such fold.
    """
    count = int(fold_of.max()) + 1
    if not 0 <= fold < count:
        raise UsageError(f"there is no fold {fold} (there are 0 to {count - 1})")
    test, val = fold_of == fold, fold_of == (fold + 1) % count
    parts = (~(test | val), val, test)
    return _checked({name: part.nonzero().flatten() for name, part in zip(PARTS, parts, strict=True)})


def by_column(words: Iterable[object], column: str = "split") -> Parts:
    """Divide by what each row says: train, val (valid, validation, dev) or test; empty cells are in no part.

    Raises:
        DataError: A cell says something else, or a part would be empty.
    """
    found: dict[Part, list[int]] = {name: [] for name in PARTS}
    for row, cell in enumerate(words):
        word = cell.strip().lower() if isinstance(cell, str) else cell
        if isinstance(word, str) and word in WORDS:
            found[WORDS[word]].append(row)
        elif not _empty(word):
            raise DataError(
                f"row {row} of column {column!r} says {cell!r}{did_you_mean(str(word), WORDS)}; a split is "
                "train, val or test"
            )
    return _checked({name: torch.tensor(rows, dtype=torch.int64) for name, rows in found.items()})


def given(**parts: Any) -> Parts:
    """Take parts as they are: `train`, `val` and `test`, numbers of rows or a truth value each.

    Raises:
        DataError: One is missing, empty, or shares rows with another.
    """
    found: Parts = {}
    for name in PARTS:
        if name not in parts:
            raise DataError(f"a split has no part {name!r}")
        part = torch.as_tensor(parts[name])
        found[name] = part.nonzero().flatten() if part.dtype == torch.bool else part.to(torch.int64)
    every = torch.cat(list(found.values()))
    if len(every.unique()) < len(every):
        raise DataError("the parts of a split share rows")
    return _checked(found)


def _empty(cell: object) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _checked(parts: Parts) -> Parts:
    for name, part in parts.items():
        if not len(part):
            sizes = ", ".join(f"{len(rows)} {each}" for each, rows in parts.items())
            raise DataError(f"a split leaves the part {name!r} empty ({sizes})")
    return parts
