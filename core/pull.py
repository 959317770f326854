"""From a reference to a model folder: downloaded, verified, and converted once where others published it.

A branch or tag is asked for when it is pulled; until the next pull it stays the commit that it was then, so
that loading needs no network and two runs load the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from manyheads.core import catalog, dialects, files, hub_api, hub_cache
from manyheads.core.card import write_card
from manyheads.core.dialects import Dialect, Option
from manyheads.core.download import download
from manyheads.core.errors import DataError, ManyheadsError, UsageError
from manyheads.core.fitting import stored_tensors
from manyheads.core.hub_api import Listing, Remote
from manyheads.core.hub_cache import Record
from manyheads.core.model_config import CARD, CONFIG, RECORD, WEIGHTS, ModelConfig, read_config
from manyheads.core.network import Refused
from manyheads.core.references import Reference
from manyheads.core.strict_json import Wrong, parse
from manyheads.core.verifying import licence_of

MAX_FILE = 64 << 30
MAX_SMALL = 8 << 20  # of a config, or of a card
Progress = Callable[[str, int, int], None]  # a file's name, bytes of all files that came, and of all


@dataclass(frozen=True)
class Choice:
    """How to take what is published; all of it is found out where it is not said.

    Args:
        dialect: The layout.
        file: Which of several weights.
        options: Of the conversion.
    """

    dialect: str = ""
    file: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether anything is said."""
        return self != Choice()


@dataclass(frozen=True)
class Pulled:
    """What a pull came to.

    Args:
        reference: What was asked for.
        commit: What it is; "" of local files.
        folder: The model folder.
        name: The model's catalogue name.
        dialect: The layout it was converted from; "" for a model folder.
        tensors, parameters: Of the weights.
        licence: Of the weights; "" where nothing says.
        files, size: That were published and taken, and their bytes.
        received: Bytes that were downloaded by this call.
        ready: Whether `predict` can use it: the folder says what the model's inputs are.
    """

    reference: str
    commit: str
    folder: Path
    name: str
    dialect: str
    tensors: int
    parameters: int
    licence: str
    files: int
    size: int
    received: int
    ready: bool


def on_terminal(name: str, received: int, total: int) -> None:
    """Show the progress on a terminal, in a line."""
    if sys.stderr.isatty():
        end = "\n" if received >= total else ""
        print(f"\r{name}: {received / 1e6:.1f} of {total / 1e6:.1f} MB", end=end, file=sys.stderr, flush=True)


def of_catalogue(name: str) -> tuple[Reference, Choice]:
    """Return where a catalogue name's published weights are.

    Raises:
        UsageError: None are known.
    """
    found = dialects.source(name)
    if found is None:
        domain = catalog.find(name).domain
        raise UsageError(
            f"no published weights of {name} are known here: train it (`manyheads {domain} fit`),"
            " or give a model folder or org/name"
        )
    reference = Reference(*found.reference.split("@", 1))
    return reference, Choice(found.dialect, found.file, found.options)


def pull(reference: Reference, choice: Choice | None = None, progress: Progress = on_terminal) -> Pulled:
    """Fetch a model as it is now, unless it is here, and return its folder.

    Raises:
        NotThere: The hub has no such model, revision or file, or not for this user.
        NetworkError: The hub cannot be asked; what came stays for the next call.
        DataError: Bytes are not what the hub lists, or the files are no model that is known here.
        ManyheadsError: No room, or the cache is damaged.
    """
    choice = choice or Choice()
    with hub_cache.locked(reference):
        if hub_api.offline():
            commit = hub_cache.remembered(reference)
            if commit is None or hub_cache.read_record(hub_cache.snapshot(reference, commit)) is None:
                raise UsageError(
                    f"{reference} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub"
                )
        else:
            commit = reference.commit or hub_api.find_commit(reference)
        received = _fetch(reference, commit, choice, progress)
        folder = _finish(reference, commit, choice)
        hub_cache.remember(reference, commit)
        return _describe(str(reference), commit, folder, received)


def locate(reference: Reference, choice: Choice | None = None) -> Path:
    """Return the model folder of a reference from the cache; pull it where it is not there."""
    choice = choice or Choice()
    commit = hub_cache.remembered(reference)
    record = None if commit is None else hub_cache.read_record(hub_cache.snapshot(reference, commit))
    if commit is not None and record is not None:
        for folder in _made(reference, commit, choice):
            made = hub_cache.read_record(folder)
            if made is not None:
                hub_cache.check_files(folder, made, thorough=False)
                return folder
    return pull(reference, choice).folder


def convert_local(published: Path, folder: Path, choice: Choice) -> Pulled:
    """Make a model folder of published files that are on this machine.

    Args:
        published: A folder of them, or one file.
        folder: The model folder to write.
        choice: How to take them.

    Raises:
        DataError: They are no model that is known here.
    """
    if published.is_file():
        base, names = published.parent, [published.name]
    else:
        base = published
        names = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]
    dialect = dialects.find(choice.dialect) if choice.dialect else dialects.identify(names, base)
    chosen = dialects.choose(dialect, names, choice.file)
    licence = dialect.licence or licence_of(base / CARD)
    _convert(base, chosen, dialect, choice.options, folder)
    _write_card(folder, published.name, licence)
    sizes = [(base / name).stat().st_size for name in chosen]
    pulled = _describe(str(published), "", folder, 0)
    return dataclasses.replace(
        pulled, dialect=dialect.name, licence=licence, files=len(chosen), size=sum(sizes)
    )


def _fetch(reference: Reference, commit: str, choice: Choice, progress: Progress) -> int:
    """Bring the published files that are needed into the snapshot; returns the bytes that were downloaded."""
    folder = hub_cache.snapshot(reference, commit)
    record = hub_cache.read_record(folder)
    if record is not None:
        hub_cache.check_files(folder, record)
        if hub_api.offline() or _has_all(folder, record, choice):
            return 0
    listing = hub_api.list_files(reference, commit)
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(record.files) if record else {}
    small = [listing.files[name] for name in sorted((dialects.marks() | {CARD}) & listing.files.keys())]
    small = [file for file in small if file.size <= MAX_SMALL]
    received = _download(listing, small, folder, known, progress)
    _, chosen = _needed(folder, listing.files, choice)
    received += _download(listing, [listing.files[name] for name in chosen], folder, known, progress)
    about = Record(str(reference), commit, hub_api.endpoint(), known, licence=licence_of(folder / CARD))
    hub_cache.write_record(folder, about)
    return received


def _download(
    listing: Listing,
    chosen: Iterable[Remote],
    folder: Path,
    known: dict[str, tuple[int, str]],
    progress: Progress,
) -> int:
    """Download what is not known yet, and enter it there."""
    lacking = [file for file in chosen if file.path not in known]
    total, done = sum(file.size for file in lacking), 0
    for file in lacking:
        if file.size > MAX_FILE:
            raise DataError(
                f"{file.path} has {file.size / 1e9:.1f} GB, more than is taken ({MAX_FILE >> 30} GB)"
            )
        place, before = hub_cache.place(folder, file.path), done
        try:
            digest = download(
                hub_api.wanted(listing, file),
                place,
                hub_api.headers(),
                lambda came, file=file, before=before: progress(file.path, before + came, total),  # type: ignore[misc]
            )
        except Refused as error:
            raise hub_api.explain(error, listing.reference) from error
        known[file.path] = (file.size, digest)
        done += file.size
    return total


def _has_all(folder: Path, record: Record, choice: Choice) -> bool:
    """Tell whether a snapshot has what is needed."""
    try:
        _needed(folder, record.files, choice)
    except ManyheadsError:
        return False
    return not choice.file or choice.file in record.files


def _needed(folder: Path, names: Iterable[str], choice: Choice) -> tuple[Dialect | None, list[str]]:
    """Return the dialect, None for a model folder, and the files that are needed."""
    names = list(names)
    if not choice.dialect and WEIGHTS in names and _is_ours(folder):
        return None, [CONFIG, WEIGHTS]
    dialect = dialects.find(choice.dialect) if choice.dialect else dialects.identify(names, folder)
    dialects.check_options(dialect, choice.options)
    return dialect, dialects.choose(dialect, names, choice.file)


def _is_ours(folder: Path) -> bool:
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_SMALL:
        return False
    try:
        found = parse(path.read_bytes())
    except Wrong:
        return False
    return isinstance(found, dict) and "format_version" in found


def _made(reference: Reference, commit: str, choice: Choice) -> list[Path]:
    """Return where the model folder of a commit may be: as published, or converted."""
    if choice.given:
        return [hub_cache.converted(reference, _name(commit, choice))]
    found = _all_of(reference, commit)
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UsageError(f"{reference} was converted in {len(found)} ways: name one of the folders ({names})")
    return found


def _name(commit: str, choice: Choice) -> str:
    """Return what a conversion is called: another choice is another one."""
    text = json.dumps(dataclasses.asdict(choice) | {"options": dict(choice.options)}, sort_keys=True)
    return f"{commit}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _finish(reference: Reference, commit: str, choice: Choice) -> Path:
    """Return the model folder of a snapshot; converted, if need be."""
    snapshot = hub_cache.snapshot(reference, commit)
    record = hub_cache.read_record(snapshot)
    assert record is not None
    dialect, chosen = _needed(snapshot, record.files, choice)
    if dialect is None:
        return snapshot
    folder = hub_cache.converted(reference, _name(commit, choice))
    made = hub_cache.read_record(folder)
    if made is not None:
        hub_cache.check_files(folder, made)
        return folder
    folder.parent.mkdir(exist_ok=True)
    licence = dialect.licence or record.licence
    _convert(snapshot, chosen, dialect, choice.options, folder)
    _write_card(folder, f"{reference.repository} at {commit}", licence)
    sizes = {n: ((folder / n).stat().st_size, files.sha256(folder / n)) for n in (CONFIG, WEIGHTS, CARD)}
    made = dataclasses.replace(
        record, files=sizes, dialect=dialect.name, options=dict(choice.options), licence=licence
    )
    hub_cache.write_record(folder, made)
    return folder


def _convert(
    base: Path, chosen: list[str], dialect: Dialect, options: Mapping[str, Option], folder: Path
) -> None:
    """Run a domain's converter; whatever it stumbles over is the files' fault."""
    dialects.check_options(dialect, options)
    published = base / chosen[0] if len(chosen) == 1 else base
    function = cast(Any, catalog.load_class(dialect.converter))
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.KEYWORD_ONLY and each.default is each.empty and each.name not in options:
            raise UsageError(f"{dialect.name} needs --option {each.name}=...: no published file says it")
    try:
        function(published, folder, **options)
    except ManyheadsError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{published.name} cannot be read as {dialect.name}: {why}") from error


def _write_card(folder: Path, origin: str, licence: str) -> None:
    text = write_card(dataclasses.asdict(read_config(folder)), origin=origin, licence=licence)
    (folder / CARD).write_text(text, encoding="utf-8")


def _describe(reference: str, commit: str, folder: Path, received: int) -> Pulled:
    """Check a model folder, and say what it is."""
    config: ModelConfig = read_config(folder)
    shapes = [shape for _, shape in stored_tensors(folder / WEIGHTS).values()]
    record = hub_cache.read_record(folder)
    if record and record.files[WEIGHTS][1] != config.weights_sha256:
        raise DataError(f"{reference}: {WEIGHTS} is not the file that its {CONFIG} names (SHA-256 differs)")
    published = hub_cache.read_record(folder.parents[1] / "files" / commit) if commit else None
    taken = published.files if published else {}
    return Pulled(
        reference=reference,
        commit=commit,
        folder=folder,
        name=config.name,
        dialect=record.dialect if record else "",
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
        licence=record.licence if record else "",
        files=len(taken),
        size=sum(size for size, _ in taken.values()),
        received=received,
        ready=bool(config.preprocessing),
    )


def copy(pulled: Pulled, folder: Path) -> Pulled:
    """Copy a model folder out of the cache.

    Raises:
        UsageError: Something else is there.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there: choose another place")
    written = files.temporary(folder)
    written.mkdir(parents=True)
    try:
        names = [name for name in (CONFIG, WEIGHTS, CARD) if (pulled.folder / name).is_file()]
        for name in names:
            shutil.copyfile(pulled.folder / name, written / name)
        record = hub_cache.read_record(pulled.folder)
        if record is not None:
            kept = {name: record.files[name] for name in names}
            hub_cache.write_record(written, dataclasses.replace(record, files=kept))
        files.replace_folder(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return dataclasses.replace(pulled, folder=folder)


def cached(reference: Reference | None = None) -> list[Path]:
    """Return the model folders in the cache: those of one reference, or all."""
    if reference is not None:
        commit = hub_cache.remembered(reference)
        return [] if commit is None else _all_of(reference, commit)
    return [folder for name, commit in hub_cache.known() for folder in _all_of(Reference(name), commit)]


def _all_of(reference: Reference, commit: str) -> list[Path]:
    snapshot = hub_cache.snapshot(reference, commit)
    if _is_ours(snapshot):
        return [snapshot]
    found = sorted((hub_cache.repository(reference) / "converted").glob(f"{commit}-*"))
    return [folder for folder in found if not folder.is_symlink() and (folder / RECORD).is_file()]
