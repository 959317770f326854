"""What `manyheads DOMAIN fit|validate|test|predict` takes, known without importing torch.

`configs/<domain>/help/<task>.txt` is the training parser's own help, written by
`python -m manyheads.apps.training`; a test regenerates it and compares. Config names resolve here too, and a
config says here which task it is of: the options depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from manyheads.core.catalog import Entry, Task, entries, tasks
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
        "items": (str, "FILE", "of a model of texts: a table of items; new ones are recommended, too"),
        "unknown": (str, "WHAT", "a user without a known item: error (default), popular or skip"),
        "bad_rows": (str, "WHAT", "rows without user, item or time: error (default) or skip"),
        "search": (str, "HOW", "exact (default), or faiss: parts of a large catalogue, with a recall check"),
        "probes": (int, "N", "lists that faiss searches for a user (64)"),
        "min_recall": (int, "PERCENT", "of the exact answer that faiss must find at least (95)"),
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
    named = values(args, "--task")
    if not named:
        found = [read_config(Path(config)).get("task") for config in values(args, "--config", "-c")]
        named = [str(name) for name in found if name is not None]
    return find_task(domain, named[-1] if named else None)


def values(args: Sequence[str], *options: str) -> list[str]:
    """Return the values that are given for an option, as `--option value` or `--option=value`."""
    found = [arg.partition("=")[2] for arg in args if "=" in arg and arg.partition("=")[0] in options]
    return found + [value for arg, value in pairwise(args) if arg in options]


def read_config(config: Path) -> dict[str, object]:
    """Return what a config holds.

    Raises:
        UsageError: It is no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{config}{where}: this is no YAML ({why})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{config}: a config is a mapping of options, as in `trainer: {{max_epochs: 3}}`")
    return {str(key): value for key, value in content.items()}


def help_text(domain: str, action: str, task: str) -> str:
    """Return the shipped help of an action for a task."""
    return (CONFIGS / domain / "help" / f"{task}.txt").read_text().replace("ACTION", action).rstrip()


@cache
def table(domain: str, task: str) -> dict[str, str]:
    """Return the options of a task's training parser with their types, as the shipped help has them.

    A group of options, which takes a mapping, has the type "".
    """
    _, _, body = help_text(domain, "fit", task).partition("\n  -h, --help")
    found = {}
    for entry in re.split(r"\n(?=  -)", body)[1:]:
        text = " ".join(entry.partition("\n\n")[0].split())
        kind = re.search(r"\((?:required, )?type: (.*?)(?:, default: .*)?\)$", text)
        name = re.search(r"--[\w.]+", text)
        assert name is not None
        found[name[0]] = kind[1] if kind else ""
    return found


def known_options(domain: str, task: str) -> list[str]:
    """Return the names of the options of a task's training parser."""
    return list(table(domain, task))


def choices(kind: str) -> list[str]:
    """Return the values that a type allows, if these are a few: those of a Literal, or of a bool."""
    if kind.startswith("bool"):
        return ["true", "false"]
    found = re.fullmatch(r"(?:Optional\[)?Literal\[([^]]*)\]+", kind)
    return [value.strip("'") for value in found[1].split(", ")] if found else []


def model_of(domain: str, args: Sequence[str]) -> Entry | None:
    """Return the catalogue's entry of the model that arguments or their configs name last.

    Args:
        domain: The domain.
        args: Arguments whose config names are resolved to files.

    Raises:
        UsageError: The domain has no such model.
    """
    named = values(args, "--model.name")
    if not named:
        models = [read_config(Path(config)).get("model") for config in values(args, "--config", "-c")]
        named = [str(model["name"]) for model in models if isinstance(model, dict) and "name" in model]
    if not named:
        return None
    known = {entry.name: entry for entry in entries(domain)}
    if named[-1] not in known:
        raise UsageError(
            f"no {domain} model {named[-1]!r}{did_you_mean(named[-1], known)}"
            f" (`manyheads models list --domain {domain}` lists them)"
        )
    return known[named[-1]]


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
