"""JSON from strangers, read strictly: finite numbers, no key twice, text that is text, and not too deep."""

from __future__ import annotations

import json
import math
from typing import NoReturn, TypeAlias

MAX_DEPTH = 16  # nesting of lists and objects

Plain: TypeAlias = bool | int | float | str | None
Json: TypeAlias = "Plain | list[Json] | dict[str, Json]"


class Wrong(Exception):
    """What is wrong with a text or a value in it; the caller adds where it stands."""


def parse(content: bytes) -> Json:
    """Parse a text.

    Raises:
        Wrong: It is no JSON, nested deeper than `MAX_DEPTH`, or holds what no plain value is.
    """

    def constant(name: str) -> NoReturn:
        raise Wrong(f"{name} is no JSON number")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else constant(text)

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Wrong("a key stands twice in one object")
        if not all(map(_is_text, found)):
            raise Wrong("a key has half a character in it")
        return found

    try:
        parsed: Json = json.loads(
            content, parse_constant=constant, parse_float=finite, object_pairs_hook=unique
        )
    except RecursionError:
        raise Wrong(f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise Wrong(f"not JSON ({error})") from error
    level: list[Json] = [parsed]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return parsed
        if any(isinstance(node, str) and not _is_text(node) for node in level):
            raise Wrong("a text has half a character in it")
        level = [child for node in level for child in children(node)]
    raise Wrong(f"nested deeper than {MAX_DEPTH}")


def children(node: Json) -> list[Json]:
    """Return the values within a list or an object; none of a plain value."""
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _is_text(text: str) -> bool:
    """Tell whether a text can be written: JSON may hold one half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
