"""Covariates: what a model is told beside its targets, and the values that each categorical column may take.

Past covariates are known in the history alone, future ones in the history and the horizon, static ones are
one value a series. In a batch the numeric columns come first, then the categorical ones as codes: 0 is an
unseen or missing value, 1 and on are the values of the train rows in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from manyheads.core.errors import DataError

Unseen = Literal["refuse", "unknown"]
Sizes: TypeAlias = dict[str, int | list[int]]

ROLES = ("past", "future", "static")


@dataclass(frozen=True)
class Role:
    """The columns of one role.

    Args:
        numeric: Columns of numbers.
        categories: Columns of categories, each with its values in the train rows.
    """

    numeric: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, as a batch has them."""
        return (*self.numeric, *self.categories)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON."""
        categories = {name: list(values) for name, values in self.categories.items()}
        return {"numeric": list(self.numeric), "categories": categories}

    @classmethod
    def from_json(cls, saved: object) -> Role:
        """Read back what `to_json` wrote.

        Raises:
            DataError: It is not that, or a category stands there twice.
        """
        if not isinstance(saved, Mapping) or set(saved) != {"numeric", "categories"}:
            raise DataError(f"a role of covariates has numeric and categories, not {str(saved)[:80]}")
        numeric, categories = saved["numeric"], saved["categories"]
        lists = [numeric, *categories.values()] if isinstance(categories, Mapping) else [None]
        if not all(_is_names(each) for each in lists):
            raise DataError("a role's columns and categories must be lists of text, none twice")
        return cls(tuple(numeric), {str(name): tuple(values) for name, values in categories.items()})


def _is_names(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return False
    return len(set(value)) == len(value)


@dataclass(frozen=True)
class Covariates:
    """The covariates that a model was trained with."""

    past: Role = Role()
    future: Role = Role()
    static: Role = Role()

    def __bool__(self) -> bool:
        return bool(self.columns)

    @property
    def roles(self) -> dict[str, Role]:
        """The roles by name."""
        return {"past": self.past, "future": self.future, "static": self.static}

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, as a batch has them."""
        return self.past.columns + self.future.columns + self.static.columns

    @property
    def numeric(self) -> tuple[str, ...]:
        """All columns of numbers."""
        return self.past.numeric + self.future.numeric + self.static.numeric

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """All columns of categories with their values."""
        return {**self.past.categories, **self.future.categories, **self.static.categories}

    def sizes(self) -> Sizes:
        """Return the sizes that a model's builder takes; a column of k known categories has k + 1 codes.

        Example:
            >>> Covariates(future=Role(("price",), {"day": ("fri", "sat")})).sizes()["future_categories"]
            [3]
        """
        found: Sizes = {}
        for name, role in self.roles.items():
            found[name] = len(role.numeric)
            found[f"{name}_categories"] = [len(values) + 1 for values in role.categories.values()]
        return found

    def to_json(self) -> dict[str, object]:
        """Return plain JSON."""
        return {name: role.to_json() for name, role in self.roles.items()}

    @classmethod
    def from_json(cls, saved: object) -> Covariates:
        """Read back what `to_json` wrote.

        Raises:
            DataError: It is not that, or a column stands there twice.
        """
        if not isinstance(saved, Mapping) or set(saved) != set(ROLES):
            raise DataError(f"covariates have the roles {', '.join(ROLES)}, not {str(saved)[:80]}")
        made = cls(*(Role.from_json(saved[name]) for name in ROLES))
        doubled = [name for i, name in enumerate(made.columns) if name in made.columns[:i]]
        if doubled:
            raise DataError(f"covariate {doubled[0]!r} has two roles")
        return made
