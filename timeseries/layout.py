"""What the columns of a table are: time, series, targets, covariates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.timeseries.covariates import ROLES

TIME_NAMES = ("ds", "date", "datetime", "timestamp", "time")
ID_NAMES = ("unique_id", "item_id", "series_id", "series", "id")


class ColumnNames(TypedDict, total=False):
    """Which columns are what, as the caller names them.

    Args:
        time_column: Name of the time column, if not a usual one.
        id_column: Name of a long table's id column, if not a usual one.
        targets: Columns to forecast; without it a wide table's columns, or `y`.
        past: Covariates that are known in the history alone.
        future: Covariates that are known in the history and the horizon. Rows at a series' end whose targets
            are all empty are its future: they hold these.
        static: Covariates that have one value a series.
        categorical: Which of the covariates are categories; the others are numbers.
    """

    time_column: str | None
    id_column: str | None
    targets: list[str] | None
    past: list[str] | None
    future: list[str] | None
    static: list[str] | None
    categorical: list[str] | None


@dataclass(frozen=True)
class Layout:
    """Which columns a table's time, id, targets and covariates are; without an id the table is wide."""

    time: str
    id: str | None
    targets: tuple[str, ...]
    past: tuple[str, ...] = ()
    future: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()

    @property
    def covariates(self) -> tuple[str, ...]:
        """The covariates of all roles."""
        return self.past + self.future + self.static

    @property
    def wanted(self) -> tuple[str, ...]:
        """All columns but the id."""
        return (self.time, *self.targets, *self.covariates)


def check_names(named: ColumnNames) -> None:
    """Refuse names that contradict each other, whatever the table.

    Raises:
        UsageError: A column has two roles, or a categorical one has none.
    """
    roles: dict[str, str] = {}
    for role in ("time_column", "id_column", "targets", *ROLES):
        given = named.get(role) or []
        for name in [given] if isinstance(given, str) else _names(given):
            if name in roles:
                raise UsageError(f"column {name!r} is named twice: in {roles[name]} and in {role}")
            roles[name] = role
    for name in named.get("categorical") or []:
        if roles.get(name) not in ROLES:
            raise UsageError(
                f"categorical {name!r} is in none of {', '.join(ROLES)}{did_you_mean(name, roles)}"
            )


def _names(given: object) -> list[str]:
    """Return a list of names that may be None; a caller in Python may give a tuple."""
    return [str(name) for name in given] if isinstance(given, list | tuple) else []


def _named(name: str, what: str, columns: Sequence[str], source: str) -> str:
    if name not in columns:
        hint = did_you_mean(name, columns)
        raise DataError(f"{source}: no {what} column {name!r}{hint} (columns: {', '.join(columns)})")
    return name


def _usual(names: Sequence[str], what: str, columns: Sequence[str], source: str) -> str | None:
    found = [column for column in columns if column.strip().lower() in names]
    if len(found) > 1:
        raise DataError(
            f"{source}: {' and '.join(map(repr, found))} could each be the {what} column; "
            f"name it with {what}_column"
        )
    return found[0] if found else None


def _time(name: str | None, columns: Sequence[str], source: str) -> str:
    """Return the time column, named or usual."""
    if name:
        return _named(name, "time", columns, source)
    found = _usual(TIME_NAMES, "time", columns, source)
    if found is None:
        hints = (did_you_mean(name, TIME_NAMES) and name for name in columns)
        like = next((f" (is it {name!r}?)" for name in hints if name), "")
        raise DataError(
            f"{source}: no time column ({', '.join(TIME_NAMES)}) among {', '.join(columns)}{like}; "
            "name it with time_column"
        )
    return found


def find_layout(columns: Sequence[str], source: str, **named: Unpack[ColumnNames]) -> Layout:
    """Find the time, id and target columns by the caller's names, or by the usual ones; covariates by name.

    A wide table's targets are all other columns. A long table's target is its only other column; if there are
    more, the caller names the targets or the covariates, because one would be taken for the other in silence.

    Args:
        columns: The table's column names.
        source: The table's name, for errors.
        named: What the caller says.

    Raises:
        DataError: A column is missing, doubled, or not to be told from others.
        UsageError: The names contradict each other.
    """
    check_names(named)
    doubled = [name for i, name in enumerate(columns) if name in columns[:i]]
    if doubled:
        raise DataError(f"{source}: two columns are named {doubled[0]!r}")
    time, id_column = _time(named.get("time_column"), columns, source), named.get("id_column")
    ident = _named(id_column, "id", columns, source) if id_column else _usual(ID_NAMES, "id", columns, source)
    past, future, static = (
        tuple(_named(name, role, columns, source) for name in _names(named.get(role))) for role in ROLES
    )
    told = {time, ident, *past, *future, *static}
    if {time, ident} & {*past, *future, *static}:
        raise DataError(f"{source}: the time or id column cannot be a covariate")
    index = re.compile(r"__index_level_\d+__")  # what pandas calls a nameless index in parquet
    others = tuple(name for name in columns if name not in told and not index.fullmatch(name))
    targets = _targets(named.get("targets"), others, ident is None, columns, source)
    if not targets:
        raise DataError(f"{source}: no column to forecast beside {time!r}")
    if set(targets) & {time, ident}:
        raise DataError(f"{source}: the time or id column cannot be a target ({', '.join(targets)})")
    return Layout(time, ident, targets, past, future, static, tuple(_names(named.get("categorical"))))


def _targets(
    named: Sequence[str] | None, others: tuple[str, ...], wide: bool, columns: Sequence[str], source: str
) -> tuple[str, ...]:
    """Return the columns to forecast."""
    if named:
        return tuple(_named(name, "target", columns, source) for name in named)
    if "" in others:
        raise DataError(
            f"{source}: a column has no name; write the table without its index, or name the targets"
        )
    if wide or len(others) <= 1:
        return others
    example = "y" if "y" in others else others[0]
    raise DataError(
        f"{source}: {', '.join(others)} are not all plainly targets; name the covariates with past, future "
        f'and static, or the columns to forecast, as in targets=["{example}"]'
    )
