"""`manyheads`: the command line. A dispatcher in the standard library; each command imports what it needs.

Nothing here imports torch: `--help`, `--version`, `models`, `data list` and a wrong option answer at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from manyheads import __version__
from manyheads.apps import options
from manyheads.apps.arguments import Parser, make_parser
from manyheads.core.catalog import DOMAINS
from manyheads.core.errors import ManyheadsError, UsageError, did_you_mean

# The commands beside the domains: each a module of `apps` with a `main(args) -> exit code`, imported when it
# is called, and what it does.
MODULES: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "train, test, save, predict and plot on real data in three minutes"),
    "models": ("models", "list the catalogue, show, pull, verify or publish one model"),
    "data": ("data", "list the data sets, or fetch one"),
    "serve": ("serving", "answer requests over HTTP with one or several models"),
    "completion": ("completion", "print the script by which bash, zsh or fish completes what you type"),
    "doctor": ("doctor", "versions, devices, and the backend that each op takes here"),
}
COMMANDS = ("predict", *MODULES, *DOMAINS)
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
    lines |= {"predict": "run a model over files as a resumable batch job"}
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


def predict(args: Sequence[str]) -> int:
    """Run a batch job."""
    parser = make_parser(
        "predict",
        "Run a model over files. The output folder holds parts, bad records, files made of several parts\n"
        "in `results` (a file a speaker, subtitles), and _SUCCESS at the end; a killed job is continued\n"
        "with --resume and gives the same bytes.",
        epilog="example: manyheads predict quickstart/model sales.parquet -o forecasts",
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, folders or patterns")
    parser.add_argument("-o", "--output", type=Path, required=True, help="output folder")
    parser.add_argument("--engine", choices=("local",), default="local", help="where shards run (local)")
    parser.add_argument("--batch-size", default="auto", help="records a batch (auto: the domain's default)")
    parser.add_argument(
        "--shard-size", default="auto", help="records a part file (auto: the domain's default, or 64)"
    )
    parser.add_argument("--workers", type=int, default=0, help="worker processes (0: this process)")
    parser.add_argument("--resume", action="store_true", help="continue a job that was stopped")
    parser.add_argument(
        "--max-bad", type=float, default=0.0, help="share of bad records that is accepted (0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    for title, known in options.SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, (kind, metavar, text) in known.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    parsed = parser.parse(args)
    from manyheads.apps.jobs import JobOptions, run_job

    result = run_job(
        JobOptions(
            model=parsed.model,
            inputs=parsed.inputs,
            output=parsed.output,
            engine=parsed.engine,
            batch_size=_number(parsed.batch_size, "--batch-size"),
            shard_size=_number(parsed.shard_size, "--shard-size"),
            workers=parsed.workers,
            resume=parsed.resume,
            max_bad=parsed.max_bad,
            quiet=parsed.quiet or parsed.json,
            settings={
                name: getattr(parsed, name)
                for known in options.SETTINGS.values()
                for name in known
                if getattr(parsed, name) is not None
            },
        )
    )
    if parsed.json:
        shown = ("records", "rows", "bad", "shards", "seconds", "preparing")
        print(json.dumps({key: getattr(result, key) for key in shown}))
    return result.exit_code


def _number(text: str, option: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} takes `auto` or a positive number, not {text!r}")
    return int(text)


def domain(name: str, args: Sequence[str]) -> int:
    """Run `manyheads DOMAIN fit|validate|test|predict`, or one of the domain's tools."""
    if not args or args[0] in ("-h", "--help"):
        print(options.overview(name))
        return 0 if args else UsageError.exit_code
    tools = options.TOOLS.get(name, {})
    if args[0] in tools:
        return int(importlib.import_module(f"manyheads.apps.{tools[args[0]][0]}").main(args[1:]))
    action, task, rest = options.check(name, args)
    if rest is None:
        print(options.help_text(name, action, task.name))
        return 0
    from manyheads.apps import training

    return training.run(name, task, action, rest)


def main_of(command: str) -> Callable[[Sequence[str]], int]:
    """Import a command that is no domain, and return its `main`."""
    if command == "predict":
        return predict
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
        return f"manyheads: {error}"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
        return f"manyheads: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    text = " ".join(str(error).split()) or type(error).__name__
    hint = "run again with --debug for the traceback"
    return f"manyheads: unexpected {type(error).__name__}: {text[:400]} ({hint})"


if __name__ == "__main__":
    sys.exit(main())
