"""The catalogue: names to builders, and tasks to classes, read without importing torch.

A domain's `catalog.py` holds `MODELS`, a tuple of `Entry`, and `TASKS`; nothing is found by scanning. It is
data, read from its file alone: the domain's package, which may import what it likes, is not imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from manyheads.core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

DOMAINS = ("vision", "timeseries", "speech", "graph", "recsys")
ROOMS = Path(__file__).parents[1]  # the checkout, or the installed package: a folder each room


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. Data only: `builder` is `"module:function"` and is imported on use.

    A builder that serves a family has its first argument, `variant`, from the entry.
    """

    name: str
    domain: str
    task: str
    builder: str
    paper: str
    licence: str
    summary: str
    variant: str | None = None


@dataclass(frozen=True)
class Task:
    """One task of a domain: the classes that train it and the one that predicts, as `"module:class"`.

    Data only, as an entry is; the name is that of `Entry.task`.
    """

    name: str
    summary: str
    training: str
    data: str
    predictor: str


@cache
def table(domain: str, name: str) -> ModuleType:
    """Run a domain's `<name>.py`, or `<name>/__init__.py`, by itself: a table that imports the core alone."""
    folder = ROOMS / domain
    path = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"manyheads.{domain}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks(domain: str) -> dict[str, Task]:
    """Return a domain's tasks by name, the usual one first: the `TASKS` of its `catalog.py`."""
    return {task.name: task for task in table(domain, "catalog").TASKS}


def load_class(reference: str) -> type:
    """Import and return what `"module:class"` names."""
    module, _, name = reference.partition(":")
    return cast(type, getattr(importlib.import_module(module), name))


def entries(domain: str | None = None) -> list[Entry]:
    """Return the catalogue's entries, of all domains or of one.

    Raises:
        UsageError: No such domain.
    """
    if domain is not None and domain not in DOMAINS:
        raise UsageError(
            f"no domain {domain!r}{did_you_mean(domain, DOMAINS)} (domains: {', '.join(DOMAINS)})"
        )
    found: dict[str, Entry] = {}
    for each in DOMAINS if domain is None else (domain,):
        for entry in table(each, "catalog").MODELS:
            if entry.name in found:
                raise RuntimeError(f"two catalogue entries are named {entry.name!r}")
            found[entry.name] = entry
    return list(found.values())


def find(name: str) -> Entry:
    """Return the entry of a name.

    Raises:
        UsageError: No model has this name; the closest name is suggested.
    """
    known = {entry.name: entry for entry in entries()}
    if name not in known:
        raise UsageError(f"no model {name!r}{did_you_mean(name, known)} (`manyheads models` lists them)")
    return known[name]


def matching(found: Iterable[Entry], pattern: str | None) -> list[Entry]:
    """Return the entries whose name a shell pattern fits; all without one.

    Raises:
        UsageError: It fits none.
    """
    found = list(found)
    kept = [entry for entry in found if pattern is None or fnmatchcase(entry.name, pattern)]
    if not kept:
        close = did_you_mean(str(pattern), [entry.name for entry in found])
        raise UsageError(f"no model fits {pattern!r}{close} (`manyheads models` lists them)")
    return kept


def list_models(domain: str | None = None, pattern: str | None = None) -> list[str]:
    """Return the names of the models, sorted; imports no torch.

    Args:
        domain: Only this domain's.
        pattern: Only names that this shell pattern fits, such as `"swin*"`.

    Raises:
        UsageError: No such domain, or no name that fits.
    """
    return sorted(entry.name for entry in matching(entries(domain), pattern))


def builder(entry: Entry) -> Callable[..., nn.Module]:
    """Import and return an entry's builder function, bound to the entry's variant."""
    module, _, function = entry.builder.partition(":")
    build = cast("Callable[..., nn.Module]", getattr(importlib.import_module(module), function))
    return build if entry.variant is None else partial(build, entry.variant)


def arguments(entry: Entry) -> str:
    """Return the builder's arguments with their defaults, read from its source without importing it.

    Example:
        >>> arguments(find("seasonal_naive"))
        'seq_len: int, pred_len: int, season_length: int=24'
    """
    return ast.unparse(_signature(entry))


def argument_names(entry: Entry) -> list[str]:
    """Return the names of the builder's arguments, read from its source without importing it."""
    found = _signature(entry)
    return [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]


def _signature(entry: Entry) -> ast.arguments:
    module, _, function = entry.builder.partition(":")
    tree = ast.parse(ROOMS.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    if entry.variant is not None:
        del found.args.args[0]
    return found.args


def create_model(name: str, **args: object) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: A catalogue name.
        args: The builder's own arguments.

    Raises:
        UsageError: Unknown name, unknown argument or a missing one.

    Example:
        >>> model = create_model("itransformer", seq_len=96, pred_len=96, d_model=256)
    """
    build = builder(find(name))
    known = inspect.signature(build).parameters
    for arg in args:
        if arg not in known:
            raise UsageError(
                f"{name} takes no argument {arg!r}{did_you_mean(arg, known)} (it takes {', '.join(known)})"
            )
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in args]
    if missing:
        raise UsageError(f"{name} needs {', '.join(missing)}")
    return build(**args)
