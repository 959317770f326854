"""No option reachable from a config can name code: jsonargparse would import and run it."""

import collections.abc
import typing
from typing import Any

import pytest

from manyheads.apps import training
from manyheads.core.catalog import DOMAINS

PLAIN = (bool, int, float, str, type(None))


def leaves(hint: Any) -> list[Any]:
    """All types inside a type hint; the values of a Literal count as their types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [type(value) for value in args]
    if args:
        return [leaf for arg in args for leaf in leaves(arg)]
    return [hint]


def options(domain: str) -> dict[str, Any]:
    """Type hints of every option of a domain's training parser, by name."""
    parser = training.make_parser(domain, "fit")
    return {action.dest: action._typehint for action in parser._actions if hasattr(action, "_typehint")}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_option_is_plain(domain: str) -> None:
    found = options(domain)
    assert len(found) > 15
    assert {"model.name", "data.dataset", "trainer.max_epochs"} <= found.keys()
    for name, hint in found.items():
        assert set(leaves(hint)) <= set(PLAIN), f"--{name} takes {hint}"


@pytest.mark.parametrize(
    "hint", [Any, collections.abc.Callable, object, dict[str, Any], list[object], type | None]
)
def test_the_walk_sees_what_it_must_refuse(hint: Any) -> None:
    assert not set(leaves(hint)) <= set(PLAIN)
