"""Tables of items: ids, and attributes as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyheads.core.errors import DataError
from manyheads.core.tables import check_columns
from manyheads.recsys.tables import Source, Tables, column_names
from manyheads.recsys.values import id_texts

if TYPE_CHECKING:
    import pyarrow as pa

Item = Mapping[str, str | None]


@dataclass(frozen=True)
class ItemTable:
    """Items with text.

    Args:
        attributes: Names, in the order of an item's text.
        items: By id, each its attributes; None where it has none. An item without any is not here.
    """

    attributes: tuple[str, ...]
    items: Mapping[str, Item]

    def texts(self) -> list[str]:
        """Return all names and values: what a vocabulary is made of."""
        return [
            text
            for item in self.items.values()
            for name, value in item.items()
            if value is not None
            for text in (name, value)
        ]

    def select(self, ids: Sequence[str]) -> ItemTable:
        """Return the items of these ids that are here, in their order."""
        return ItemTable(self.attributes, {id: self.items[id] for id in ids if id in self.items})


def read_items(source: Source, item: str = "item_id", attributes: Sequence[str] | None = None) -> ItemTable:
    """Read a table of items.

    Numbers are text by their digits, lists by their entries with commas between; an empty cell is no
    attribute, and an item without any attribute has no text.

    Args:
        source: Files or a DataFrame (`tables.Tables` says which).
        item: The column of ids.
        attributes: The columns that are read, in this order; None for all others.

    Raises:
        DataError: The source cannot be read, lacks a column, an item has no id or comes twice, or a cell is
            no text.
        UsageError: There is no such source.
    """
    names = column_names(source)
    check_columns(_name(source), names, [item])
    wanted = [name for name in names if name != item] if attributes is None else list(attributes)
    if not wanted:
        raise DataError(f"{_name(source)} has no column of attributes beside {item!r}")
    tables = Tables(source)
    found: dict[str, Item] = {}
    for batch in tables.batches([item, *wanted]):
        if tables.broken.count:
            raise DataError(tables.broken.first)
        ids, missing = id_texts(batch.columns[item], item)
        if missing.any():
            row = batch.first + int(missing.argmax()) + 1
            raise DataError(f"{batch.source}, row {row}: {item!r} is missing")
        cells = [_texts(batch.columns[name], f"{batch.source}: column {name!r}") for name in wanted]
        for number, id in enumerate(ids.cast("string").to_pylist()):
            if id in found:
                raise DataError(f"{batch.source}, row {batch.first + number + 1}: item {id!r} comes twice")
            found[id] = {name: column[number] for name, column in zip(wanted, cells, strict=True)}
    if tables.broken.count:
        raise DataError(tables.broken.first)
    found = {id: each for id, each in found.items() if any(value is not None for value in each.values())}
    if not found:
        raise DataError(f"{_name(source)} has no item with text")
    return ItemTable(tuple(wanted), found)


def _texts(column: pa.Array, name: str) -> list[str | None]:
    """Return cells as text, an empty one as None."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    plain = (
        pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
        or pa.types.is_string_view(inner)
        or pa.types.is_integer(inner)
        or pa.types.is_floating(inner)
        or pa.types.is_boolean(inner)
        or pa.types.is_null(inner)
    )
    if not plain:
        raise DataError(f"{name} holds {kind}, and attributes are text, numbers, or lists of these")
    return [_text(value) for value in column.to_pylist()]


def _text(value: object) -> str | None:
    if isinstance(value, list):
        parts = [text for each in value if (text := _text(each)) is not None]
        return ", ".join(parts) or None
    if value is None or value != value:  # noqa: PLR0124  # NaN
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:g}"
    return str(value).strip() or None


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else "the table of items"
