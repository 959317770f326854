"""The argument parser of every command: in the standard library, with errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import NoReturn

from manyheads.core.errors import UsageError, did_you_mean


class _CapturedError(Exception):
    """Carries a command's parser out of its `main`."""


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a suggestion for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(f"{message} (`{self.prog} --help` shows the usage)")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse; an unknown option is answered first, before what else may be missing."""
        if _capturing.get():
            raise _CapturedError(self)
        known = [option for action in self._actions for option in action.option_strings]
        for arg in args[: args.index("--") if "--" in args else len(args)]:
            option = arg.split("=", 1)[0]
            if option.startswith("--") and option not in known:
                raise UsageError(
                    f"{self.prog} takes no {option!r}{did_you_mean(option, known)}"
                    f" (`{self.prog} --help` shows the usage)"
                )
        return self.parse_args(args)


def capture(main: Callable[[Sequence[str]], int], args: Sequence[str] = ()) -> Parser:
    """Return the parser that a command's `main` makes for some arguments, without running the command."""
    token = _capturing.set(True)
    try:
        main(args)
    except _CapturedError as found:
        parser: Parser = found.args[0]
        return parser
    finally:
        _capturing.reset(token)
    raise RuntimeError(f"{main} parses nothing")


def make_parser(command: str, description: str, epilog: str = "") -> Parser:
    """Return the parser of a command, without options but --help."""
    return Parser(
        prog=f"manyheads {command}".strip(),
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(option: str, value: int | None) -> int | None:
    """Return a number that is at least 1, or None.

    Raises:
        UsageError: It is below 1.
    """
    if value is not None and value < 1:
        raise UsageError(f"{option} must be at least 1, not {value}")
    return value


def levels(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read levels of quantiles, as in 0.1,0.5,0.9.

    Raises:
        UsageError: They are no numbers between 0 and 1, or do not rise.
    """
    if text is None:
        return None
    try:
        found = [float(part) for part in text.strip("[]").split(",")]
    except ValueError:
        found = []
    if not found or found != sorted(set(found)) or not all(0 < level < 1 for level in found):
        raise UsageError(
            f"{option} takes numbers between 0 and 1, rising, each once, as in 0.1,0.5,0.9; not {text!r}"
        )
    return tuple(found)
