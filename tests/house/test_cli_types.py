"""No option reachable from a config can name code: jsonargparse would import and run it."""

import collections.abc
import typing
from typing import Any

import pytest

from manyheads.apps import trainer
from manyheads.core.catalog import DOMAINS, Task, tasks

PLAIN = (bool, int, float, str, type(None))


def leaves(hint: Any) -> list[Any]:
    """All types inside a type hint; the values of a Literal count as their types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [type(value) for value in args]
    if args:
        return [leaf for arg in args for leaf in leaves(arg)]
    return [hint]


def options(domain: str, task: Task) -> dict[str, Any]:
    """Type hints of every option of a task's training parser, by name."""
    parser = trainer.make_parser(domain, task, "fit")
    return {action.dest: action._typehint for action in parser._actions if hasattr(action, "_typehint")}


@pytest.mark.parametrize(
    ("domain", "task"),
    [pytest.param(d, task, id=f"{d}-{task.name}") for d in DOMAINS for task in tasks(d).values()],
)
def test_every_option_is_plain(domain: str, task: Task) -> None:
    found = options(domain, task)
    assert len(found) > 15
    assert {"model.name", "data.dataset", "trainer.max_epochs"} <= found.keys()
    for name, hint in found.items():
        assert set(leaves(hint)) <= set(PLAIN), f"--{name} takes {hint}"


@pytest.mark.parametrize(
    "hint", [Any, collections.abc.Callable, object, dict[str, Any], list[object], type | None]
)
def test_the_walk_sees_what_it_must_refuse(hint: Any) -> None:
    assert not set(leaves(hint)) <= set(PLAIN)
