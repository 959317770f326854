"""`manyheads`: the command line. A dispatcher in the standard library; each command imports what it needs.

Nothing here imports torch: `--help`, `--version`, `models`, `data list` and a wrong option answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import cast

from manyheads import __version__
from manyheads.apps import checking, options
from manyheads.apps.arguments import Parser, make_parser
from manyheads.core.catalog import DOMAINS
from manyheads.core.errors import ManyheadsError, UsageError, did_you_mean

# The commands beside the domains: each a module of `apps` with a `main(args) -> exit code`, imported when it
# is called, and what it does.
MODULES: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "train, test, save, predict and plot on real data in three minutes"),
    "predict": ("predict", "run a model over files as a resumable batch job"),
    "jobs": ("jobs_command", "tell how far a batch job is"),
    "models": ("models", "list the catalogue, show, pull, verify or publish one model"),
    "data": ("data", "list the data sets, or fetch one"),
    "serve": ("serving", "answer requests over HTTP with one or several models"),
    "export": ("export", "write a model as a torch.export program or as ONNX, and check the file"),
    "completion": ("completion", "print the script by which bash, zsh or fish completes what you type"),
    "doctor": ("doctor", "versions, devices, and the backend that each op takes here"),
}
COMMANDS = (*MODULES, *DOMAINS)
INTERRUPTED = 130


# What `manyheads DOMAIN fit` trains, for the help.
TRAINS = {
    "vision": "an image classifier",
    "timeseries": "a forecaster, or a model of classes, gaps or anomalies",
    "speech": "a separator or a recogniser",
    "graph": "a model of molecules or networks",
    "recsys": "a recommender",
}


def _top() -> Parser:
    lines = {f"{name} fit ...": f"train {what} from a config" for name, what in TRAINS.items()}
    lines |= {name: text for name, (_, text) in MODULES.items()}
    parser = make_parser(
        "",
        "Sequence models on one attention/SSM core: train, test, and run them over files.",
        epilog="commands:\n"
        + "\n".join(f"  {name:19}  {text}" for name, text in lines.items())
        + f"\n\nbeside fit: {', '.join([*options.ACTIONS][1:])}, and what `manyheads DOMAIN --help` lists;\n"
        "`manyheads COMMAND --help` shows a command's options, `--debug` before or after it tracebacks.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=f"manyheads {__version__}")
    return parser


def domain(name: str, args: Sequence[str]) -> int:
    """Run `manyheads DOMAIN fit|validate|test|predict`, or one of the domain's tools."""
    if not args or args[0] in ("-h", "--help"):
        print(options.overview(name))
        return 0 if args else UsageError.exit_code
    tools = options.TOOLS.get(name, {})
    if args[0] in tools:
        return int(importlib.import_module(f"manyheads.apps.{tools[args[0]][0]}").main(args[1:]))
    action, task, rest = checking.check(name, args)
    if rest is None:
        print(options.help_text(name, action, task.name))
        return 0
    from manyheads.apps import training

    return training.run(name, task, action, rest)


def main_of(command: str) -> Callable[[Sequence[str]], int]:
    """Import a command that is no domain, and return its `main`."""
    return cast(
        "Callable[[Sequence[str]], int]",
        importlib.import_module(f"manyheads.apps.{MODULES[command][0]}").main,
    )


def dispatch(args: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not args:
        _top().print_help()
        return UsageError.exit_code
    command, rest = args[0], args[1:]
    if command in DOMAINS:
        return domain(command, rest)
    if command in COMMANDS:
        return main_of(command)(rest)
    if not command.startswith("-"):
        raise UsageError(
            f"no command {command!r}{did_you_mean(command, COMMANDS)} (`manyheads --help` lists them)"
        )
    _top().parse(args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `manyheads` script.

    Returns:
        0 done, 1 failure, 2 usage or config, 3 bad records above --max-bad, 130/143 signals.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return dispatch(args)
    except ManyheadsError as error:
        failure: BaseException = error
        code = error.exit_code
    except KeyboardInterrupt as error:
        failure, code = error, INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to say
        return 1
    except Exception as error:
        failure, code = error, 1
    if debug:
        traceback.print_exception(failure)
    print(_message(failure, code), file=sys.stderr)
    return code


def _message(error: BaseException, code: int) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "manyheads: stopped"
    if isinstance(error, ManyheadsError):
        return str(error) if str(error).startswith("manyheads ") else f"manyheads: {error}"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
        return f"manyheads: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    text = " ".join(str(error).split()) or type(error).__name__
    hint = "run again with --debug for the traceback"
    return f"manyheads: unexpected {type(error).__name__}: {text[:400]} ({hint})"


if __name__ == "__main__":
    sys.exit(main())
