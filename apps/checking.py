"""What is wrong with the arguments and configs of `manyheads DOMAIN fit`, found before torch is imported.

The shipped help is the table of options and types; names of models and of their arguments are those of the
catalogue. What is not found here, the training's own parser finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from manyheads.apps import options
from manyheads.core.catalog import Entry, Task, argument_names
from manyheads.core.errors import UsageError, did_you_mean

ARGUMENTS = "--model.arguments"
_NUMBERS = {"int": ("a whole number", int), "float": ("a number", float), "int | float": ("a number", float)}


def check(domain: str, args: Sequence[str]) -> tuple[str, Task, list[str] | None]:
    """Check an action, its options and its configs, and resolve config names.

    Returns:
        The action, its task, and its arguments with config names replaced by paths; None where help was
        asked for.

    Raises:
        UsageError: No such action, option, config, model or value; the closest is suggested.
    """
    action, *rest = args
    if action not in options.ACTIONS:
        actions = (*options.ACTIONS, *options.TOOLS.get(domain, {}))
        raise UsageError(
            f"no action {action!r}{did_you_mean(action, actions)} (actions: {', '.join(actions)})"
        )
    if any(arg in ("-h", "--help") for arg in rest):
        return action, options.find_task(domain, *options.values(rest, "--task")[-1:]), None
    resolved = options.with_config_paths(domain, rest)
    task = options.task_of(domain, resolved)
    known = options.table(domain, task.name)
    command = f"manyheads {domain} {action}"
    given = list(_given(command, resolved, known))
    for option, value in given:
        if value is not None and (problem := wrong(known.get(option, ""), value)):
            raise UsageError(f"{option} {problem}")
    files = [Path(value) for option, value in given if option == "--config" and value]
    if not files:
        raise UsageError(f"--config is needed: a file, or one of {', '.join(options.configs(domain))}")
    written: list[str] = []
    for file in files:  # a later config's arguments stand for an earlier one's
        found = _check_config(file, known)
        written = written if found is None else found
    typed = [option.removeprefix(f"{ARGUMENTS}.") for option, _ in given if f"{ARGUMENTS}." in option]
    model = options.model_of(domain, resolved)
    if model is not None and model.task == task.name:  # of another task: that says what is wrong
        _check_arguments(model, [*written, *typed])
    return action, task, resolved


def _given(command: str, args: Sequence[str], known: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield each option with its value, None where it stands behind no `=` and takes none."""
    help = f"(`{command} --help` lists the options)"
    waiting = iter(args)
    for arg in waiting:
        option, equals, value = arg.partition("=")
        option = "--config" if option == "-c" else option.removesuffix("+")
        if not option.startswith("--"):
            raise UsageError(f"{command} takes no {arg!r} {help}")
        if option not in known and not option.startswith(f"{ARGUMENTS}."):
            raise UsageError(f"{command} takes no {option!r}{did_you_mean(option, known)} {help}")
        if equals or option == "--print_config":
            yield option, value or None
            continue
        follows = next(waiting, None)
        if follows is None or follows.startswith("--"):
            raise UsageError(f"{option} needs a value {help}")
        yield option, follows


def wrong(kind: str, value: object) -> str:
    """Say what is wrong with a value for an option of a type; nothing where it may be right.

    Args:
        kind: The type, as the shipped help says it.
        value: What was typed, or what a config holds.
    """
    if value is None or value == "null":
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    number = _NUMBERS.get(kind.removesuffix(" | null"))
    if number is not None:
        name, convert = number
        try:
            convert(text)
        except ValueError:
            return f"takes {name}, not {text[:80]!r}"
        return ""
    known = options.choices(kind)
    if (
        not known
        or text in known
        or (kind.startswith("bool") and re.fullmatch("(?i)true|false|yes|no", text))
    ):
        return ""
    which = " or ".join(known) if len(known) < 3 else f"one of {', '.join(known)}"
    return f"takes {which}, not {text[:80]!r}{did_you_mean(text, known)}"


def _check_config(file: Path, known: Mapping[str, str]) -> list[str] | None:
    """Check a config's keys and values; returns the names of the model's arguments, if it has any to say."""
    arguments: list[str] | None = None

    def walk(content: Mapping[str, object], prefix: str) -> None:
        nonlocal arguments
        for key, value in content.items():
            name = f"{prefix}{key}".removesuffix("+")
            option = f"--{name}"
            if option == ARGUMENTS and (value is None or isinstance(value, Mapping)):
                arguments = [str(argument) for argument in value or ()]
            elif option not in known:
                close = did_you_mean(option, known).replace("--", "")
                raise UsageError(f"{file}: unknown key {name!r}{close}")
            elif not known[option] and isinstance(value, Mapping):
                walk(value, f"{name}.")
            elif problem := wrong(known[option], value):
                raise UsageError(f"{file}: {name} {problem}")

    walk(options.read_config(file), "")
    return arguments


def _check_arguments(model: Entry, asked: Sequence[str]) -> None:
    known = argument_names(model)
    for name in asked:
        if name not in known:
            raise UsageError(
                f"{model.name} takes no argument {name!r}{did_you_mean(name, known)}"
                f" (`manyheads models show {model.name}` lists them)"
            )
