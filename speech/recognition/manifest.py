"""A table of recordings and texts (CSV, parquet, JSON lines): checked by headers alone, and divided.

A row without text or audio, or whose recording cannot be read, is an error or left out, as is wanted; the
reason is said either way. What is too short or too long is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.speech.audio import Recording
from manyheads.speech.recognition.utterances import Utterance
from manyheads.speech.sources import TABLES, AudioRef, Listing, list_audio

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
_PARTS: dict[str, Part] = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"dev": "val", "test": "test", "eval": "test"},
}


@dataclass(frozen=True)
class Columns:
    """A table's columns; `id`, and `start` and `end` in seconds, are used where they are there.

    Args:
        audio: Path relative to the table; in parquet also the bytes.
        text: What is said.
        split: train, val or test (also dev, valid, validation, eval); used where there is such a column.
        group: Who speaks, or what else must not be in two parts; None for nothing.
    """

    audio: str = "audio"
    text: str = "text"
    split: str = "split"
    group: str | None = None


@dataclass(frozen=True)
class Splits:
    """How rows are divided where the table does not say.

    Args:
        val_share: Share that becomes validation.
        test_share: Share that becomes the test; where the table names parts, none is made.
    """

    val_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.val_share < 1 and 0 <= self.test_share < 1 - self.val_share):
            raise UsageError("splits.val_share and splits.test_share must be shares that leave some to train")


@dataclass(frozen=True)
class Limits:
    """Which rows are used.

    Args:
        shortest, longest: Seconds.
        skip: Leave out bad rows, and log them, instead of refusing the table.
    """

    shortest: float
    longest: float
    skip: bool


class Recordings:
    """Utterances of a table.

    Args:
        source: The table, for messages.
        refs: Their places and texts.
        seconds: How long each is.
        sample_rate: At which they are read.
        channel: Which is read.
    """

    def __init__(
        self,
        source: str,
        refs: Sequence[AudioRef],
        seconds: NDArray[np.floating],
        sample_rate: int,
        channel: str,
    ) -> None:
        self._source, self.refs, self._seconds = source, Listing(refs), seconds
        self.sample_rate, self.channel = sample_rate, channel

    @property
    def source(self) -> str:
        """The table."""
        return self._source

    @cached_property
    def ids(self) -> list[str]:
        """Of the listing."""
        return [ref.id for ref in self.refs]

    @cached_property
    def texts(self) -> list[str]:
        """Of the table."""
        return [ref.text or "" for ref in self.refs]

    @property
    def seconds(self) -> NDArray[np.floating]:
        """By the headers."""
        return self._seconds

    def read(self, index: int, epoch: int = 0) -> Utterance:
        """Read a recording; it is the same each epoch."""
        ref = self.refs[index]
        return Utterance(ref.read(self.sample_rate, self.channel), ref.text or "")


def read_manifest(
    path: Path,
    columns: Columns,
    splits: Splits,
    limits: Limits,
    sample_rate: int,
    channel: str = "mix",
    seed: int = 0,
) -> dict[Part, Recordings]:
    """Read a table, look at every recording's header, and divide.

    Args:
        path: CSV, parquet or JSON lines.
        columns: What they are called.
        splits: How rows are divided where the table does not say.
        limits: Which rows are used.
        sample_rate: At which recordings will be read.
        channel: Which will be read: mix, or a number.
        seed: Of the division.

    Raises:
        DataError: It is no such table, a bad row is an error, or a part has no rows.
    """
    if not str(path).lower().endswith(TABLES):
        raise UsageError(f"{path}: recordings with texts are a table ({', '.join(TABLES)})")
    listing = list_audio(path, audio_column=columns.audio, text_column=columns.text)
    if all(ref.text is None for ref in listing):
        raise DataError(f"{path} has no column {columns.text!r}, or no text in it")
    kept, seconds = _usable(path, listing, limits, channel)
    parts = _divide(path, columns, splits, len(listing), np.array(kept), seed)
    found: dict[Part, Recordings] = {}
    part: Part
    for part in ("train", "val", "test"):
        mine = np.flatnonzero(parts == part)
        refs = [listing[kept[i]] for i in mine]
        found[part] = Recordings(str(path), refs, seconds[mine], sample_rate, channel)
    for part in ("train", "val"):
        if not found[part].refs:
            raise DataError(f"{path}: no usable row is left for the part {part!r}")
    log.info("%s: %s", path, ", ".join(f"{len(each.refs)} {part}" for part, each in found.items()))
    return found


def _usable(
    path: Path, listing: Listing, limits: Limits, channel: str
) -> tuple[list[int], NDArray[np.floating]]:
    """Return the rows that can be used, and how long each is."""
    kept, seconds, bad, short, long = [], [], dict[str, str](), 0, 0
    for number, ref in enumerate(listing):
        try:
            length = _length(ref, channel)
        except BadRecord as error:
            bad[ref.id] = str(error)
            continue
        short += length < limits.shortest
        long += length > limits.longest
        if limits.shortest <= length <= limits.longest:
            kept.append(number)
            seconds.append(length)
    if bad:
        name, why = next(iter(bad.items()))
        if not limits.skip:
            raise DataError(
                f"{path}: {len(bad)} of {len(listing)} rows cannot be used, the first is {name} ({why}); "
                "mend them, or leave them out with loading.bad: skip"
            )
        log.warning("%s: %d rows are left out, the first is %s (%s)", path, len(bad), name, why)
    if short or long:
        log.warning(
            "%s: %d rows below %g s and %d above %g s are left out",
            path, short, limits.shortest, long, limits.longest,
        )  # fmt: skip
    if not kept:
        raise DataError(f"{path}: no row can be used")
    return kept, np.array(seconds)


def _length(ref: AudioRef, channel: str) -> float:
    """Return seconds, of the part if it is one."""
    if ref.text is None or not ref.text.strip():
        raise BadRecord("it has no text")
    with Recording(ref.load(), channel=channel) as recording:
        start, stop = ref.bounds(recording)
        return (stop - start) / recording.sample_rate


def _divide(
    path: Path, columns: Columns, splits: Splits, rows: int, kept: NDArray[np.integer], seed: int
) -> NDArray[np.str_]:
    """Return the part of each usable row."""
    table = _more_columns(path, [columns.split, *([columns.group] if columns.group else [])])
    if len(table.columns) and len(table) != rows:
        raise DataError(f"{path}: {len(table)} rows of parts and {rows} of recordings; it has empty lines?")
    if columns.group and columns.group not in table:
        raise DataError(f"{path} has no column {columns.group!r} (columns.group)")
    if columns.split in table:
        names = table[columns.split].astype(str).str.strip().str.lower()
        wrong = sorted(set(names) - set(_PARTS))
        if wrong:
            raise DataError(
                f"{path}: column {columns.split!r} has {wrong[0]!r}, which is no part"
                f"{did_you_mean(wrong[0], _PARTS)} (parts: {', '.join(_PARTS)})"
            )
        parts = np.array([_PARTS[name] for name in names])[kept]
        if (parts == "val").any():
            return parts
        shares = (splits.val_share, 0.0)
    else:
        parts, shares = np.full(len(kept), "train"), (splits.val_share, splits.test_share)
    groups = table[columns.group].astype(str).to_numpy()[kept] if columns.group else np.arange(len(kept))
    mine = np.flatnonzero(parts == "train")
    names_of = np.random.default_rng(seed).permutation(np.unique(groups[mine]))
    val, test = (max(1, round(share * len(names_of))) if share else 0 for share in shares)
    if val + test >= len(names_of):
        raise DataError(f"{path}: {len(names_of)} groups of rows are too few to divide")
    parts[mine[np.isin(groups[mine], names_of[:val])]] = "val"
    parts[mine[np.isin(groups[mine], names_of[val : val + test])]] = "test"
    return parts


def _more_columns(path: Path, wanted: list[str]) -> pd.DataFrame:
    """Read columns of a table that the listing does not have; those that are there."""
    lower = str(path).lower()
    if lower.endswith((".parquet", ".pq")):
        import pyarrow.parquet as pq

        there = pq.read_schema(path).names
        return pd.read_parquet(path, columns=[name for name in wanted if name in there])
    if lower.endswith((".jsonl", ".ndjson")):
        table = pd.read_json(path, lines=True, dtype=False)
    else:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=True)
    return table[[name for name in wanted if name in table]]
