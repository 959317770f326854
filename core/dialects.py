"""The layouts that other people publish weights in, and where a catalogue name's weights are. Data only.

A domain's `dialects.py` holds `DIALECTS`, a tuple of `Dialect`, and `SOURCES`, catalogue names to `Source`;
it may have `FIND`, as "module:function", for names with too many sources for a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from manyheads.core import catalog
from manyheads.core.catalog import DOMAINS, table
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.strict_json import Wrong, parse

Option = str | int | float | bool
MAX_CONFIG_BYTES = 8 << 20


@dataclass(frozen=True)
class Dialect:
    """One published layout.

    Args:
        name: What commands call it.
        summary: What it is, in a line.
        files: The files that it is made of. "a|b" takes the first of these that is there; one with a "?"
            at its end may be missing; patterns may have stars.
        converter: "module:function", which takes what was published (its only file, or the folder of
            several), the model folder to write, and the options.
        mark: A file, a key of it and the values that tell this layout ("*" for any).
        options: What the converter can be told.
        named: It has no mark: it is taken where the caller names it, alone.
        licence: Of the weights, where all in this layout have one that their pages may not say.
    """

    name: str
    summary: str
    files: tuple[str, ...]
    converter: str
    mark: tuple[str, str, tuple[str, ...]] | None = None
    options: tuple[str, ...] = ()
    named: bool = False
    licence: str = ""


@dataclass(frozen=True)
class Source:
    """Where the published weights of a catalogue name are.

    Args:
        reference: As in "org/name" or "org/name@revision".
        dialect: In which layout.
        file: Which of several weights there.
        options: Of the conversion.
    """

    reference: str
    dialect: str
    file: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)


def dialects() -> dict[str, Dialect]:
    """Return all layouts by name, those of one domain after another."""
    found: dict[str, Dialect] = {}
    for domain in DOMAINS:
        for dialect in table(domain, "dialects").DIALECTS:
            if dialect.name in found:
                raise RuntimeError(f"two dialects are named {dialect.name!r}")
            found[dialect.name] = dialect
    return found


def find(name: str) -> Dialect:
    """Return the dialect of a name.

    Raises:
        UsageError: There is none; the closest name is suggested.
    """
    known = dialects()
    if name not in known:
        raise UsageError(f"no dialect {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    return known[name]


def source(name: str) -> Source | None:
    """Return where a catalogue name's weights are; None where none are known."""
    listed = table(catalog.find(name).domain, "dialects")
    found = listed.SOURCES.get(name)
    if found is None and hasattr(listed, "FIND"):
        found = cast(Any, catalog.load_class(listed.FIND))(name)
    return cast("Source | None", found)


def marks() -> set[str]:
    """Return the names of the small files that tell dialects apart."""
    return {dialect.mark[0] for dialect in dialects().values() if dialect.mark}


def identify(names: Iterable[str], folder: Path) -> Dialect:
    """Return the dialect of published files, by their names and the marks, which are in the folder.

    Raises:
        DataError: It is none that is known here, or more than one.
    """
    names = list(names)
    found = [
        dialect
        for dialect in dialects().values()
        if not dialect.named
        and all(_matching(part, names) or part.endswith("?") for part in dialect.files)
        and (dialect.mark is None or _has_mark(folder, *dialect.mark))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"the files fit {' and '.join(each.name for each in found)}: choose by --dialect")
    shown = ", ".join(sorted(names)[:6])
    raise DataError(
        f"no model folder and no published layout that is known here (files: {shown}"
        f"{', ...' if len(names) > 6 else ''}); --dialect names one: {', '.join(dialects())}"
    )


def choose(dialect: Dialect, names: Iterable[str], file: str = "") -> list[str]:
    """Return the files that a dialect needs.

    Args:
        dialect: Which.
        names: Of all files.
        file: The one to take where a pattern fits several.

    Raises:
        DataError: One is missing, or several fit.
    """
    names, chosen = sorted(names), []
    if file and file not in names:
        raise DataError(f"there is no file {file!r}{did_you_mean(file, names)}")
    for part in dialect.files:
        found = _matching(part, names)
        if len(found) > 1 and file in found:
            found = [file]
        if len(found) > 1:
            raise DataError(f"{len(found)} files fit {part}: choose by --file ({', '.join(found[:6])})")
        if not found and not part.endswith("?"):
            raise DataError(f"{dialect.name} needs {part.replace('|', ' or ')}, which is not there")
        chosen += found
    return chosen


def check_options(dialect: Dialect, options: Mapping[str, Option]) -> None:
    """Refuse options that a dialect does not take.

    Raises:
        UsageError: Says which, and what it takes.
    """
    for name in options:
        if name not in dialect.options:
            close, takes = did_you_mean(name, dialect.options), ", ".join(dialect.options) or "none"
            raise UsageError(f"{dialect.name} takes no option {name!r}{close} (it takes {takes})")


def _matching(part: str, names: Iterable[str]) -> list[str]:
    """The files that the first fitting alternative of a part fits."""
    for pattern in part.removesuffix("?").split("|"):
        found = [name for name in names if fnmatchcase(name, pattern)]
        if found:
            return found
    return []


def _has_mark(folder: Path, name: str, key: str, values: tuple[str, ...]) -> bool:
    found = read_mark(folder / name, key)
    return found is not None and any(fnmatchcase(found, value) for value in values)


def read_mark(path: Path, key: str) -> str | None:
    """Return the text of a key at the top of a small JSON or YAML file; None where there is none."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return None
    content = path.read_bytes()
    if path.suffix == ".yaml":
        line = re.search(
            rf"^{re.escape(key)}:[ \t]*([\w.-]+)[ \t]*\r?$", content.decode("utf-8", "replace"), re.M
        )
        return line[1] if line else None
    try:
        parsed = parse(content)
    except Wrong:
        return None
    value = parsed.get(key) if isinstance(parsed, dict) else None
    return value if isinstance(value, str) else None
