"""Who speaks in which recording, and in which part: of a table, or of a folder of speakers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.speech.sources import TABLES, AudioRef, list_audio

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
_NAMES: dict[str, Part] = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"dev": "val", "test": "test", "eval": "test"},
}


@dataclass(frozen=True)
class Columns:
    """A table's columns.

    Args:
        audio: Path relative to the table; in parquet also the bytes.
        speaker: Who speaks.
        split: train, val or test (also dev, valid, validation, eval, and names that begin so, as
            train-clean-100); used where there is such a column.
    """

    audio: str = "audio"
    speaker: str = "speaker"
    split: str = "split"


@dataclass(frozen=True)
class Splits:
    """How speakers are divided where their source does not say; no speaker is in two parts.

    Args:
        val_share: Share of the training speakers that becomes validation.
        test_share: Share of all speakers that becomes the test.
    """

    val_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"splits.{name} must lie between 0 and 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Recordings:
    """Recordings of one part, and who speaks in each."""

    refs: list[AudioRef]
    speakers: list[str]


def find_speakers(
    source: Path, columns: Columns, splits: Splits, speakers: int, seed: int
) -> dict[Part, Recordings]:
    """Find recordings and speakers, and divide the speakers into parts.

    Args:
        source: A table (CSV, parquet, JSON lines), a folder with a metadata.csv, or a folder of folders: of
            speakers, or of parts (train, val, test) that hold those of speakers.
        columns: Of a table.
        splits: Where the source does not say.
        speakers: Voices of a mixture: what a part needs at least.
        seed: Of the division.

    Raises:
        UsageError: There is no such source.
        DataError: What is wrong with it.
    """
    if not source.exists():
        raise UsageError(f"no recordings at {source}: there is no such file or folder")
    table = source / "metadata.csv" if source.is_dir() else source
    if table.is_file():
        refs, names, parts = _of_table(table, columns)
    else:
        refs, names, parts = _of_folder(source)
    if parts is None:
        parts = _divided(names, splits, speakers, seed, str(source))
    of = _part_of_each(names, parts, str(source))
    if "val" not in parts:
        parts = _with_validation(names, parts, splits, speakers, seed)
        of = _part_of_each(names, parts, str(source))
    for part in PARTS:
        count = list(of.values()).count(part)
        if count < speakers and (part != "test" or count):  # a source may have no test
            raise DataError(f"{source}: {count} {part} speakers are not enough to mix {speakers}")
    found = {part: Recordings([], []) for part in PARTS}
    for ref, name, part in zip(refs, names, parts, strict=True):
        found[part].refs.append(ref)
        found[part].speakers.append(name)
    return found


def _of_table(table: Path, columns: Columns) -> tuple[list[AudioRef], list[str], list[Part] | None]:
    if not table.name.lower().endswith(TABLES):
        raise UsageError(f"{table}: not a table ({', '.join(TABLES)}) or a folder")
    refs = list(list_audio(table, audio_column=columns.audio))
    frame = _read(table, [columns.speaker, columns.split])
    if columns.speaker not in frame:
        hint = did_you_mean(columns.speaker, [str(name) for name in frame])
        raise DataError(f"{table} has no column {columns.speaker!r}{hint}")
    names = frame[columns.speaker].astype(object).where(frame[columns.speaker].notna(), None).tolist()
    for row, name in enumerate(names, 1):
        if name is None:
            raise DataError(f"{table}, row {row}: no {columns.speaker}")
    if columns.split not in frame:
        return refs, [str(name) for name in names], None
    parts = [_part(each, f"{table}, row {row}") for row, each in enumerate(frame[columns.split], 1)]
    return refs, [str(name) for name in names], parts


def _read(table: Path, wanted: Sequence[str]) -> pd.DataFrame:
    name = table.name.lower()
    if name.endswith((".parquet", ".pq")):
        import pyarrow.parquet as pq

        have = pq.read_schema(table).names
        return pd.read_parquet(table, columns=[each for each in wanted if each in have])
    if name.endswith((".jsonl", ".ndjson")):
        return pd.read_json(table, lines=True, dtype=False)
    return pd.read_csv(table, dtype=str)


def _part(value: object, where: str) -> Part:
    text = str(value)
    name = _stem(text)
    if name not in _NAMES:
        raise DataError(f"{where}: {text!r} is none of {', '.join(_NAMES)}")
    return _NAMES[name]


def _stem(name: str) -> str:
    """Return what stands before the first dash, line or slash: `train` of `train-clean-100/1.flac`."""
    return re.split("[-_/]", name, maxsplit=1)[0]


def _of_folder(folder: Path) -> tuple[list[AudioRef], list[str], list[Part] | None]:
    """Take the folders above the recordings for speakers; those above these may be parts."""
    refs = list(list_audio(folder))
    places = [ref.id.split("/") for ref in refs]
    for ref, place in zip(refs, places, strict=True):
        if len(place) < 2:
            raise DataError(f"{folder}: {ref.id} lies in no speaker's folder")
    tops = {place[0] for place in places}
    if all(_stem(top) in _NAMES for top in tops):
        for ref, place in zip(refs, places, strict=True):
            if len(place) < 3:
                raise DataError(f"{folder}: {ref.id} lies in no speaker's folder")
        parts = [_part(place[0], str(folder)) for place in places]
        return refs, [place[1] for place in places], parts
    return refs, [place[0] for place in places], None


def _divided(names: Sequence[str], splits: Splits, least: int, seed: int, source: str) -> list[Part]:
    """Divide speakers by shares."""
    order = np.random.default_rng(seed).permutation(sorted(set(names)))
    test = max(least, round(splits.test_share * len(order)))
    val = max(least, round(splits.val_share * (len(order) - test)))
    if len(order) < test + val + least:
        raise DataError(
            f"{source}: {len(order)} speakers are not enough for three parts of {least} or more each"
        )
    of = dict(zip(order.tolist(), ["test"] * test + ["val"] * val + ["train"] * len(order), strict=False))
    return [of[name] for name in names]


def _with_validation(
    names: Sequence[str], parts: list[Part], splits: Splits, least: int, seed: int
) -> list[Part]:
    """Take some training speakers for validation, for the source has none."""
    train = sorted({name for name, part in zip(names, parts, strict=True) if part == "train"})
    count = max(least, round(splits.val_share * len(train)))
    chosen = set(np.random.default_rng(seed).permutation(train)[:count].tolist())
    pairs = zip(names, parts, strict=True)
    return ["val" if part == "train" and name in chosen else part for name, part in pairs]


def _part_of_each(names: Sequence[str], parts: Sequence[Part], source: str) -> dict[str, Part]:
    """Return each speaker's part; refuse a speaker in two."""
    of: dict[str, Part] = {}
    for name, part in zip(names, parts, strict=True):
        if of.setdefault(name, part) != part:
            raise DataError(f"{source}: speaker {name} is in two parts, {of[name]} and {part}")
    return of
