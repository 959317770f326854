"""`manyheads completion SHELL`: a script by which the shell completes commands, options and names.

The script asks `manyheads completion words -- WORD...` at each press of the key, so it holds no list that
could age. What it asks for is known without torch: the parsers of the commands, the shipped help of the
trainings, the catalogue, the configs and the data sets. Where nothing is known the shell offers files.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from manyheads.apps import options
from manyheads.apps.arguments import Parser, capture, make_parser
from manyheads.apps.checking import ARGUMENTS
from manyheads.core import catalog, datasets
from manyheads.core.catalog import DOMAINS
from manyheads.core.errors import ManyheadsError

# In each script the last word is the one that is being typed; bash cuts words at `=` and `:` by itself.
SCRIPTS = {
    "bash": """\
# In ~/.bashrc: eval "$(manyheads completion bash)"
_manyheads() {
    local IFS=$'\\n'
    COMPREPLY=($(manyheads completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o bashdefault -F _manyheads manyheads
""",
    "zsh": """\
#compdef manyheads
# In ~/.zshrc, after compinit: eval "$(manyheads completion zsh)"
_manyheads() {
    local -a found
    found=("${(@f)$(manyheads completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then
        compadd -- "${found[@]}"
    else
        _files
    fi
}
compdef _manyheads manyheads
""",
    "fish": """\
# In ~/.config/fish/config.fish: manyheads completion fish | source
function __manyheads_complete
    set -l typed (commandline -opc)[2..-1] (commandline -ct)
    set -l found (manyheads completion words -- $typed 2>/dev/null)
    if test -n "$found[1]"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c manyheads -f -a '(__manyheads_complete)'
""",
}
WORDS = "words"  # what the scripts call; not for people
NAMES = ("NAME", "MODEL", "REF", "REFERENCE", "PATTERN")  # what `manyheads models` calls a model's name


def _parser() -> Parser:
    parser = make_parser(
        "completion",
        "Print the script by which a shell completes commands, options, configs, models and data sets.",
        epilog='examples:\n  eval "$(manyheads completion bash)"       in ~/.bashrc\n'
        '  eval "$(manyheads completion zsh)"        in ~/.zshrc, after compinit\n'
        "  manyheads completion fish | source        in ~/.config/fish/config.fish",
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="bash, zsh or fish")
    return parser


def main(args: Sequence[str]) -> int:
    """Print a shell's script, or the words that may stand where one is being typed."""
    if args and args[0] == WORDS:
        found = complete(args[1:][args[1:2] == ["--"] :])
        if found:
            print("\n".join(found))
        return 0
    print(SCRIPTS[_parser().parse(args).shell], end="")
    return 0


def complete(typed: Sequence[str]) -> list[str]:
    """Return what may stand for the last word; nothing where files may.

    Args:
        typed: The words behind `manyheads`, the last as far as it is typed.
    """
    *before, word = list(typed) or [""]
    if word == "=":  # as bash cuts `--config=name`
        word = ""
    elif before[-1:] == ["="]:
        before.pop()
    stem, equals, value = word.partition("=")
    if equals and stem.startswith("--"):
        before, word = [*before, stem], value
    try:
        found = _candidates([each for each in before if each not in ("=", "--debug")], word)
    except ManyheadsError:  # what was typed is wrong already: there is nothing to offer
        return []
    prefix = f"{stem}=" if equals and stem.startswith("--") else ""
    return [f"{prefix}{each}" for each in sorted(set(found)) if each.startswith(word)]


def _candidates(before: list[str], word: str) -> Iterable[str]:
    from manyheads.apps.cli import COMMANDS, main_of

    if not before:
        return (*COMMANDS, *(("--help", "--version", "--debug") if word.startswith("-") else ()))
    command, *rest = before
    if command in DOMAINS:
        return _of_domain(command, rest, word)
    if command not in COMMANDS or rest[:1] == [WORDS]:
        return ()
    parser = capture(main_of(command), rest[:1])  # `models pull` has a parser of its own
    deeper = len(parser.prog.split()) - 2
    return _of_parser(parser, rest[deeper:], word, command, None)


def _of_domain(domain: str, before: list[str], word: str) -> Iterable[str]:
    tools = options.TOOLS.get(domain, {})
    if not before:
        return (*options.ACTIONS, *tools)
    if before[0] in tools:
        tool = importlib.import_module(f"manyheads.apps.{tools[before[0]][0]}")
        return _of_parser(capture(tool.main), before[1:], word, domain, domain)
    return _of_training(domain, before[1:], word) if before[0] in options.ACTIONS else ()


def _of_training(domain: str, before: list[str], word: str) -> Iterable[str]:
    """What may follow `manyheads DOMAIN fit`."""
    last = before[-1] if before else ""
    given = options.with_config_paths(domain, before[:-1] if last in ("--config", "-c") else before)
    task = options.task_of(domain, given).name
    known = options.table(domain, task)
    values = {
        **{option: found for option, kind in known.items() if (found := options.choices(kind))},
        "--config": options.configs(domain),
        "-c": options.configs(domain),
        "--task": list(catalog.tasks(domain)),
        "--model.name": [entry.name for entry in catalog.entries(domain) if entry.task == task],
        "--data.dataset": [each.name for each in datasets.datasets(domain)],
    }
    if last in values:
        return values[last]
    if not word.startswith("-"):
        return ()
    model = options.model_of(domain, given)
    deeper = [f"{ARGUMENTS}.{name}" for name in (catalog.argument_names(model) if model else ())]
    return (*known, *deeper, "--help")


def _of_parser(
    parser: Parser, before: list[str], word: str, command: str, domain: str | None
) -> Iterable[str]:
    """What may stand behind the words of a command that has a parser of its own."""
    flags = {name: action for action in parser._actions for name in action.option_strings}
    last = flags.get(before[-1]) if before else None
    places = [action for action in parser._actions if not action.option_strings]
    given = _positionals(before, flags)
    if given and isinstance(places[0], argparse._SubParsersAction):
        deeper = places[0].choices.get(given[0])
        after = before[before.index(given[0]) + 1 :]
        return _of_parser(deeper, after, word, f"{command} {given[0]}", domain) if deeper else ()
    if last is not None and last.nargs != 0:
        place: argparse.Action | None = last
    elif word.startswith("-"):
        return flags
    elif len(given) < len(places):
        place = places[len(given)]
    else:
        place = places[-1] if places and places[-1].nargs in ("+", "*") else None
    if place is None or place.choices:
        return map(str, place.choices or ()) if place else ()
    return _names(place, given, word, command, domain)


def _names(
    place: argparse.Action, given: Sequence[str], word: str, command: str, domain: str | None
) -> Iterable[str]:
    """Names for a place that has no choices of its own: data sets or models, else nothing (files)."""
    if command == "data":
        return [each.name for each in datasets.datasets()] if given == ["get"] else ()
    shows_names = command.startswith("models") and str(place.metavar or place.dest).upper() in NAMES
    is_model = str(place.metavar or place.dest).upper() == "MODEL" and not any(Path().glob(f"{word}*"))
    return [entry.name for entry in catalog.entries(domain)] if shows_names or is_model else ()


def _positionals(before: Sequence[str], flags: dict[str, argparse.Action]) -> list[str]:
    """Return the words that are neither options nor their values."""
    found: list[str] = []
    previous = None
    for each in before:
        takes = previous is not None and previous.nargs != 0
        if each in flags:
            previous = flags[each]
            continue
        if not takes:
            found.append(each)
        previous = None
    return found
