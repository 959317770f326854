"""Docstrings as the reference shows them: an example is code, and `q, k, v: ...` says of three arguments what it says.

mkdocstrings loads `Docstrings` when it collects a module.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8,}\S.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites what the parser of docstrings does not know."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Change a docstring before it is parsed; a model's page begins with that of its file."""
        if obj.docstring is None:
            return
        if obj.is_module and re.fullmatch(r"manyheads\.\w+\.models\.\w+", obj.path):
            obj.docstring = None
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = SEVERAL.sub(_apart, text)


def _apart(found: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))
