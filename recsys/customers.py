"""Texts and who wrote or reads them: a row's cells become tokens, numbers and categories.

What is missing: a text counts as its column's name alone; a number is NaN and a category -1, for each of
which the model has a vector of its own. A category that training has not seen counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from manyheads.core.errors import BadRecord, DataError, UsageError
from manyheads.recsys.models.cross_attention import MISSING
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.texts import ItemTexts, TextBatch, TextTokens, item_texts, text_batch

GAPS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
Cells: TypeAlias = Mapping[str, object]
Hidden: TypeAlias = Literal["none", "texts", "variables"]


@dataclass(frozen=True)
class Fields:
    """What the columns of a table are.

    Args:
        texts: Read one behind the other, each after its name.
        numbers: Variables that are numbers.
        categories: Variables that are not.
        label: The class, or several labels.
        separator: Of several labels in a cell, such as "|"; empty: a row has one class.
        id: Names the rows; None numbers them from 0.

    Raises:
        UsageError: There is no text, or no variable, or a column is two of these.
    """

    texts: list[str] = field(default_factory=lambda: ["text"])
    numbers: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    label: str = "label"
    separator: str = ""
    id: str | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("fields.texts names no column")
        if not self.numbers and not self.categories:
            raise UsageError("fields.numbers and fields.categories name no column: there are no variables")
        every = [*self.inputs, self.label]
        if double := next((name for name in every if every.count(name) > 1), None):
            raise UsageError(f"fields: the column {double!r} is named twice")

    @property
    def inputs(self) -> list[str]:
        """The columns that the model sees."""
        return [*self.texts, *self.numbers, *self.categories]


@dataclass(frozen=True)
class TextLimits:
    """How texts are cut into tokens.

    Args:
        vocab_size: Tokens at most of the vocabulary, which is made of training's texts.
        max_text_tokens: Of one text, with its column's name.
        max_tokens: Of all texts of a row.
    """

    vocab_size: int = 8192
    max_text_tokens: int = 256
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if min(self.max_text_tokens, self.max_tokens) < 2:
            raise UsageError("limits.max_text_tokens and limits.max_tokens must be at least 2")


class Sample(NamedTuple):
    """A row as the model takes it, its texts not cut into tokens yet.

    Shape:
        numbers and kinds: one a variable.
    """

    texts: dict[str, str | None]
    numbers: list[float]
    kinds: list[int]


class Inputs(NamedTuple):
    """A batch of rows.

    Shape:
        texts `[B, N]`; numbers `[B, numbers]`; kinds `[B, categories]`.
    """

    texts: TextBatch
    numbers: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Customers:
    """What training knows of a table's columns.

    Args:
        fields: The columns.
        limits: How texts are cut.
        tokens: The vocabulary.
        mean, std: Of the numbers.
        kinds: The categories of each column.
        labels: The classes.
        hidden: What the model is not shown: a measure of what the rest is worth.
    """

    fields: Fields
    limits: TextLimits
    tokens: TextTokens
    mean: list[float]
    std: list[float]
    kinds: list[list[str]]
    labels: list[str]
    hidden: Hidden = "none"

    def __post_init__(self) -> None:
        numbers = {name: place for place, name in enumerate(self.fields.numbers)}
        codes = [{kind: place for place, kind in enumerate(kinds)} for kinds in self.kinds]
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "_codes", codes)

    def sample(self, cells: Cells) -> Sample:
        """Take a row.

        Raises:
            BadRecord: A cell is no number.
        """
        of = self.fields
        texts = {name: "" if self.hidden == "texts" else text_of(cells[name]) or "" for name in of.texts}
        if self.hidden == "variables":
            return Sample(dict(texts), [math.nan] * len(of.numbers), [MISSING] * len(of.categories))
        found = [number_of(cells[name], name) for name in of.numbers]
        numbers = [(x - m) / s for x, m, s in zip(found, self.mean, self.std, strict=True)]
        codes = cast("list[dict[str, int]]", self._codes)  # type: ignore[attr-defined]
        kinds = [
            MISSING if (kind := text_of(cells[name])) is None else code.get(kind, MISSING)
            for name, code in zip(of.categories, codes, strict=True)
        ]
        return Sample(dict(texts), numbers, kinds)

    def cut(self, texts: Sequence[Mapping[str, str | None]]) -> ItemTexts:
        """Cut the texts of rows into tokens."""
        return item_texts(self.tokens, texts, len(self.fields.texts), self.limits.max_text_tokens)

    def read(self, items: ItemTexts, rows: Tensor) -> TextBatch:
        """Put the texts of some rows together, `rows [B]`."""
        each = torch.arange(len(rows) + 1, dtype=torch.int32)
        return text_batch(items, Packed(rows + FIRST, each), max_tokens=self.limits.max_tokens)

    def batch(self, samples: Sequence[Sample]) -> Inputs:
        """Put rows together."""
        items = self.cut([sample.texts for sample in samples])
        numbers = torch.tensor([sample.numbers for sample in samples], dtype=torch.float32)
        kinds = torch.tensor([sample.kinds for sample in samples], dtype=torch.int64)
        size = len(samples)
        return Inputs(self.read(items, torch.arange(size)), numbers.view(size, -1), kinds.view(size, -1))

    def model_inputs(self) -> dict[str, int | list[int]]:
        """Return the builder's arguments that the data decide."""
        return {
            "vocab_size": len(self.tokens),
            "classes": len(self.labels),
            "numeric": len(self.fields.numbers),
            "categories": [len(kinds) for kinds in self.kinds],
            "positions": self.limits.max_tokens + 2,
        }

    def to_json(self) -> dict[str, object]:
        """Return plain JSON; the vocabulary is packed."""
        return {
            "fields": asdict(self.fields),
            "limits": asdict(self.limits),
            "tokens": self.tokens.packed(),
            "mean": self.mean,
            "std": self.std,
            "kinds": self.kinds,
            "labels": self.labels,
            "hidden": self.hidden,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, object]) -> Customers:
        """Read what `to_json` wrote.

        Raises:
            DataError: It is not that.
        """
        wanted = {"fields", "limits", "tokens", "mean", "std", "kinds", "labels", "hidden"}
        if set(found) != wanted:
            raise DataError(f"the model folder's preprocessing has {sorted(found)}, not {sorted(wanted)}")
        try:
            fields = Fields(**cast("dict[str, str]", found["fields"]))  # type: ignore[arg-type]
            limits = TextLimits(**cast("dict[str, int]", found["limits"]))
        except (TypeError, UsageError) as error:
            raise DataError(f"the model folder's fields cannot be read ({error})") from error
        mean, std, kinds, labels = (found[key] for key in ("mean", "std", "kinds", "labels"))
        good = (
            all(_texts(each) for each in (fields.texts, fields.numbers, fields.categories, labels))
            and all(isinstance(each, str) for each in (fields.label, fields.separator, fields.id or ""))
            and all(isinstance(each, int) for each in vars(limits).values())
            and isinstance(kinds, list)
            and all(_texts(each) for each in kinds)
            and len(kinds) == len(fields.categories)
            and all(_numbers(each, len(fields.numbers)) for each in (mean, std))
            and all(each > 0 for each in cast("list[float]", std))
            and found["hidden"] in ("none", "texts", "variables")
        )
        if not good:
            raise DataError("the model folder's preprocessing is not that of texts and variables")
        return cls(
            fields,
            limits,
            TextTokens.from_packed(found["tokens"]),
            cast("list[float]", mean),
            cast("list[float]", std),
            cast("list[list[str]]", kinds),
            cast("list[str]", labels),
            cast(Hidden, found["hidden"]),
        )


def text_of(cell: object) -> str | None:
    """Return a cell as text without blanks around it; None where it is missing."""
    if cell is None or cell != cell:  # noqa: PLR0124  # NaN
        return None
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # a whole number in a column with gaps
    text = str(cell).strip()
    return None if text in GAPS else text


def number_of(cell: object, name: str) -> float:
    """Return a cell as a number, NaN where it is missing.

    Raises:
        BadRecord: It is no finite number.
    """
    text = text_of(cell)
    if text is None:
        return math.nan
    try:
        found = float(text)
    except ValueError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRecord(f"column {name!r} holds {text[:40]!r}, which is no number")
    return found


def labels_of(cell: object, separator: str) -> list[str]:
    """Return a cell's labels: one at most where nothing separates them."""
    text = text_of(cell)
    if text is None:
        return []
    return [part.strip() for part in text.split(separator) if part.strip()] if separator else [text]


def _texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _numbers(found: object, count: int) -> bool:
    if not isinstance(found, list) or len(found) != count:
        return False
    return all(isinstance(each, int | float) and math.isfinite(each) for each in found)
