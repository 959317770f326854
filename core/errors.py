"""The errors that users see: what was wrong, where, and what to do, in a line or two."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ManyheadsError(Exception):
    """Something failed for a reason the user can act on; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(ManyheadsError):
    """A command, option, name or config is wrong."""

    exit_code = 2


class DataError(ManyheadsError):
    """Input data cannot be used as they are."""


class BadRecord(DataError):
    """One record cannot be used; a job writes it to its bad file and goes on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or an empty string.

    Example:
        >>> did_you_mean("itransfomer", ["itransformer", "dlinear"])
        "; did you mean 'itransformer'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
