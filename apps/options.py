"""What `manyheads DOMAIN fit|validate|test|predict` takes, known without importing torch.

`configs/<domain>/help/<task>.txt` is the training parser's own help, written by
`python -m manyheads.apps.training`; a test regenerates it and compares. Config names resolve here too, and a
config says here which task it is of: the options depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from manyheads.core.catalog import Task, argument_names, entries, tasks
from manyheads.core.errors import UsageError, did_you_mean

CONFIGS = Path(__file__).parent / "configs"
ACTIONS = {
    "fit": "train, keep the best and the last checkpoint, write a model folder",
    "validate": "measure the best checkpoint on the validation split",
    "test": "measure the best checkpoint on the test split",
    "predict": "run the model on the config's data as a batch job (forecasts go on past their end)",
}
SETTINGS: dict[str, dict[str, tuple[type, str, str]]] = {
    "images": {
        "output_kind": (str, "KIND", "label (default), probabilities; of images also logits, features"),
        "top_k": (int, "N", "labels a row (5); of recommendations, items a user (10)"),
    },
    "graphs": {
        "smiles_column": (str, "NAME", "a table's column of molecules (smiles)"),
        "id_column": (str, "NAME", "a table's column of ids (id, if there is one; else a number)"),
        "neighbours": (str, "KIND", "that a model trained on samples sees: sampled (default) or all"),
    },
    "recordings": {
        "channel": (str, "C", "mix, the mean of all channels (default), or the number of one, from 0"),
    },
    "separation": {
        "chunk_seconds": (int, "S", "what the model sees at once (24)"),
        "overlap_seconds": (int, "S", "of neighbouring chunks; by it speakers keep their order (8)"),
        "span_seconds": (int, "S", "done at once, and again where a job is killed (120)"),
        "sample_format": (str, "F", "of the speakers' files: pcm16 (default) or float"),
        "silent_db": (int, "DB", "a speaker below this level, of the mixture's, is called silent (-40)"),
    },
    "recognition": {
        "vad": (str, "KIND", "how speech is found: silero (default), energy or none"),
        "segment_seconds": (int, "S", "of a segment, at most (30)"),
        "batch_seconds": (int, "S", "of sound that the model sees at once (120); less takes less memory"),
        "subtitles": (str, "F", "none (default), srt, vtt or both: files in `results`"),
    },
    "recommendations": {
        "seen": (str, "WHAT", "items of a user's history: leave_out (default) or keep"),
        "allow": (str, "FILE", "an item a line: only these are recommended"),
        "deny": (str, "FILE", "an item a line: none of these is"),
        "unknown": (str, "WHAT", "a user without a known item: error (default), popular or skip"),
        "bad_rows": (str, "WHAT", "rows without user, item or time: error (default) or skip"),
    },
}  # what predictors know by name, `predict --NAME`; each says itself what is wrong with a value
TOOLS: dict[str, dict[str, tuple[str, str]]] = {
    "vision": {
        "explain": ("explain", "draw what a model looks at in photos: attention rollout, Grad-CAM"),
        "knn": ("knn", "measure a model's features by nearest neighbours, without training"),
    },
    "timeseries": {
        "backtest": (
            "backtest",
            "measure a model on rolling windows, by series, beside the published figure",
        ),
        "plot": ("plot", "draw a model's forecasts of a file, or what its variates attend to"),
    },
    "graph": {
        "explain": ("explain_graph", "what a prediction rests on: attention and attributions, with pictures"),
    },
}  # what a domain has beside the actions: each a module of `apps`, which reads its own options


def configs(domain: str) -> list[str]:
    """Return the names of a domain's shipped configs."""
    return sorted(path.stem for path in (CONFIGS / domain).glob("*.yaml"))


def resolve_config(domain: str, name: str) -> Path:
    """Return the file of a config given by name or path.

    Raises:
        UsageError: Neither a shipped config nor a file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or "/" in name:
        if not path.is_file():
            raise UsageError(f"no config file {name}")
        return path
    known = configs(domain)
    if name not in known:
        raise UsageError(
            f"no {domain} config {name!r}{did_you_mean(name, known)} (shipped: {', '.join(known)})"
        )
    return CONFIGS / domain / f"{name}.yaml"


def overview(domain: str) -> str:
    """Return the help of `manyheads DOMAIN`."""
    lines = [f"usage: manyheads {domain} {{{','.join(ACTIONS)}}} --config NAME_OR_FILE [options]", ""]
    lines += [f"  {action:9} {text}" for action, text in ACTIONS.items()]
    tools = TOOLS.get(domain, {})
    if tools:
        lines += ["", f"beside these, each with options of its own (`manyheads {domain} TOOL --help`):"]
        lines += [f"  {tool:9} {text}" for tool, (_, text) in tools.items()]
    lines += ["", "tasks, named by --task or by `task` in the config (the first one by default):"]
    lines += [f"  {task.name:15} {task.summary}" for task in tasks(domain).values()]
    lines += ["", f"shipped configs: {', '.join(configs(domain))}"]
    lines += [f"`manyheads {domain} fit --task TASK --help` shows the options; each can stand in a config."]
    return "\n".join(lines)


def find_task(domain: str, name: str | None = None) -> Task:
    """Return a domain's task by name, the usual one by default.

    Raises:
        UsageError: The domain has no such task.
    """
    known = tasks(domain)
    if name is not None and name not in known:
        raise UsageError(f"no {domain} task {name!r}{did_you_mean(name, known)} (tasks: {', '.join(known)})")
    return known[name] if name is not None else next(iter(known.values()))


def task_of(domain: str, args: Sequence[str]) -> Task:
    """Return the task that arguments ask for: by --task, else by `task` in the last config that names one.

    Args:
        args: Arguments whose config names are resolved to files.

    Raises:
        UsageError: The domain has no such task.
    """
    named = _values(args, "--task")
    if not named:
        named = [_read(Path(config)).get("task") for config in _values(args, "--config", "-c")]
        named = [str(name) for name in named if name is not None]
    return find_task(domain, named[-1] if named else None)


def _values(args: Sequence[str], *options: str) -> list[str]:
    """Return the values given for an option, as `--option value` or `--option=value`."""
    found = [arg.partition("=")[2] for arg in args if "=" in arg and arg.partition("=")[0] in options]
    return found + [value for arg, value in pairwise(args) if arg in options]


def _read(config: Path) -> dict[str, object]:
    """Return what a config holds; what is wrong with one, the parser says."""
    import yaml

    try:
        content = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def help_text(domain: str, action: str, task: str) -> str:
    """Return the shipped help of an action for a task."""
    return (CONFIGS / domain / "help" / f"{task}.txt").read_text().replace("ACTION", action).rstrip()


def known_options(domain: str, task: str) -> list[str]:
    """Return the options of a task's training parser, as the shipped help lists them."""
    return re.findall(r"^  (?:-\w(?: \w+)?, )?(--[\w.]+)", help_text(domain, "fit", task), re.MULTILINE)


def choices(domain: str, task: str) -> dict[str, list[str]]:
    """Return the values of the options of a task's training parser that take one of a few."""
    found = re.findall(
        r"^  (?:-\w(?: \w+)?, )?(--[\w.]+) \{(.*)\}", help_text(domain, "fit", task), re.MULTILINE
    )
    return {option: values.split(",") for option, values in found}


def argument_options(args: Sequence[str]) -> list[str]:
    """Return `--model.arguments.NAME` for what the model that arguments or their configs name takes.

    Args:
        args: Arguments whose config names are resolved to files.
    """
    named = _values(args, "--model.name") or [
        str(model["name"])
        for config in _values(args, "--config", "-c")
        for model in [_read(Path(config)).get("model")]
        if isinstance(model, dict) and "name" in model
    ]
    known = {entry.name: entry for entry in entries()}
    if not named or named[-1] not in known:
        return []
    return [f"--model.arguments.{name}" for name in argument_names(known[named[-1]])]


def check(domain: str, args: Sequence[str]) -> tuple[str, Task, list[str] | None]:
    """Check an action and its options, and resolve config names.

    Returns:
        The action, its task, and its arguments with config names replaced by paths; None where help was
        asked for.

    Raises:
        UsageError: No such action, option or config; the closest is suggested.
    """
    action, *rest = args
    if action not in ACTIONS:
        actions = (*ACTIONS, *TOOLS.get(domain, {}))
        raise UsageError(
            f"no action {action!r}{did_you_mean(action, actions)} (actions: {', '.join(actions)})"
        )
    if any(arg in ("-h", "--help") for arg in rest):
        return action, find_task(domain, *_values(rest, "--task")[-1:]), None
    resolved = with_config_paths(domain, rest)
    task = task_of(domain, resolved)
    known = known_options(domain, task.name)
    for arg in rest:
        option = arg.split("=", 1)[0]
        if option.startswith("--") and not _is_known(option, known):
            raise UsageError(
                f"manyheads {domain} {action} takes no {option!r}{did_you_mean(option, known)}"
                f" (`manyheads {domain} {action} --help` lists the options)"
            )
    if not any(arg.split("=", 1)[0] in ("--config", "-c") for arg in rest):
        raise UsageError(f"--config is needed: a file, or one of {', '.join(configs(domain))}")
    return action, task, resolved


def _is_known(option: str, known: Sequence[str]) -> bool:
    return option.removesuffix("+") in known or option.startswith("--model.arguments.")


def with_config_paths(domain: str, args: Sequence[str]) -> list[str]:
    """Return the arguments with the names of configs replaced by their files."""
    found: list[str] = []
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c") and equals:
            found.append(f"--config={resolve_config(domain, value)}")
        elif index and args[index - 1] in ("--config", "-c"):
            found.append(str(resolve_config(domain, arg)))
        else:
            found.append(arg)
    return found
