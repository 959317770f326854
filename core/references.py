"""References to models on a hub, `org/name` or `org/name@revision`, and which file names they may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_PATTERN = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9_.+/-]{{0,199}}))?")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Reference:
    """A model on a hub.

    Args:
        repository: As in "org/name".
        revision: A branch, a tag or a commit; None is the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision, where it is a commit."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def parse(text: str) -> Reference | None:
    """Return the reference that a text is; None where it is none.

    Example:
        >>> parse("org/name@v1.0")
        Reference(repository='org/name', revision='v1.0')
    """
    found = _PATTERN.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or "//" in text or text.endswith(("/", ".", ".git")):
        return None
    return Reference(found[1], found[2])


def is_commit(text: object) -> bool:
    """Tell whether this is a commit: 40 hex digits."""
    return isinstance(text, str) and bool(_COMMIT.fullmatch(text))


def is_path(name: str) -> bool:
    """Tell whether a file's name in a repository stays in its folder, on every system.

    Example:
        >>> is_path("onnx/model.onnx"), is_path("../model.onnx"), is_path("C:/model.onnx")
        (True, False, False)
    """
    parts = name.split("/")
    return (
        bool(name)
        and len(name) <= 500
        and name.isprintable()
        and not any(letter in name for letter in '\\:*?"<>|')
        and all(part.strip(" .") and len(part.encode()) <= 200 for part in parts)
        and all(not part.endswith((".", " ")) for part in parts)
    )
