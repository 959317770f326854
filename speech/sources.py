"""Where recordings come from: folders, files, patterns and manifests; listed without being opened.

- A folder: every file with the suffix of a sound file, at any depth, sorted; hidden files are left out, links
  to folders not followed. Ids are relative paths.
- Files: as given, whatever the suffix. Ids are their paths below their common folder.
- A manifest (CSV, parquet, JSON lines): column `audio` with a path relative to the manifest, in parquet also
  bytes, or a struct that has `bytes`; optional `id`, `text`, and `start` and `end` in seconds. Ids are the
  column `id`, else the path, with `#start-end` behind it where a row is a part of a recording, else the row's
  number.
- A DataFrame with the same columns.

Several sources together: ids begin with the source's name.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import quote

from torch import Tensor

from manyheads.core.errors import BadRecord, DataError, UsageError, did_you_mean
from manyheads.speech.audio import Channel, Recording

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".csv.gz", ".parquet", ".pq", ".jsonl", ".ndjson")
# What a folder of recordings holds. Those that cannot be read are listed too, and refused with the reason: a
# recording left out in silence would be worse.
# fmt: off
SUFFIXES = frozenset((
    ".wav", ".wave", ".rf64", ".w64", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc",
    ".au", ".snd", ".caf", ".sph", ".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4", ".ape", ".ac3",
))
# fmt: on
COLUMNS = ("audio", "id", "text", "start", "end")
SOURCES = "a folder, a sound file, a manifest (csv, parquet, jsonl), a list of these, or a DataFrame"
KEPT = " !#$&'()+,;=@[]{}^~-_."  # of a name, beside letters and digits
LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True, slots=True)
class Cell:
    """Bytes in a parquet file, not yet read."""

    table: str
    column: str
    row: int


@dataclass(frozen=True, slots=True)
class AudioRef:
    """One recording of a listing, or a part of one.

    Args:
        id: Unique within the listing.
        place: Its file, its content, or where the content lies; None where a manifest's row names nothing.
        text: What is said, where a manifest says so.
        start, end: The part, in seconds; None: from the beginning, to the end.
        named: A manifest names its file.
    """

    id: str
    place: str | bytes | Cell | None
    text: str | None = None
    start: float | None = None
    end: float | None = None
    named: bool = False

    def load(self) -> Path | bytes:
        """Return what `speech.audio` reads.

        Raises:
            BadRecord: A manifest's row names nothing.
        """
        place = _cell(self.place) if isinstance(self.place, Cell) else self.place
        if not place:
            raise BadRecord("the row has no audio")
        return Path(place) if isinstance(place, str) else place

    def bounds(self, recording: Recording) -> tuple[int, int]:
        """Return the part's first sample and the one behind its last, at the recording's `sample_rate`.

        Raises:
            BadRecord: The part has no sample, or does not lie in the recording.
        """
        rate, length = recording.sample_rate, len(recording)
        start = round((self.start or 0) * rate)
        stop = length if self.end is None else round(self.end * rate)
        if stop > length + rate // 100:  # a rounded end may lie a few samples behind the true one
            raise BadRecord(f"end {self.end:g} s lies behind the recording's {length / rate:.3f} s")
        if not 0 <= start < min(stop, length):
            raise BadRecord(f"a part from {self.start or 0:g} s to {stop / rate:g} s has no samples")
        return start, min(stop, length)

    def read(self, sample_rate: int, channel: Channel = "mix") -> Tensor:
        """Read it, `[L]` float32; raises BadRecord where it cannot be used."""
        with Recording(self.load(), sample_rate, channel) as recording:
            return recording.read(*self.bounds(recording))


class Listing(Sequence[AudioRef]):
    """The recordings of a source, in a fixed order. Nothing is open; a slice has no memory of the rest."""

    def __init__(self, refs: Sequence[AudioRef]) -> None:
        self._refs = list(refs)

    def __len__(self) -> int:
        return len(self._refs)

    @overload
    def __getitem__(self, index: int) -> AudioRef: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> AudioRef | Listing:
        return Listing(self._refs[index]) if isinstance(index, slice) else self._refs[index]

    def named_files(self) -> Iterator[str]:
        """Yield the files that manifests name, each once: their content is not the manifest's own."""
        yield from dict.fromkeys(
            ref.place for ref in self._refs if ref.named and isinstance(ref.place, str) and ref.place
        )


def list_audio(source: object, *, audio_column: str = "audio", text_column: str = "text") -> Listing:
    """List the recordings of a source without opening any.

    Args:
        source: A path or pattern, several of them, or a DataFrame.
        audio_column, text_column: A manifest's columns of these.

    Raises:
        UsageError: No such source, or two of one name.
        DataError: A manifest without the column, an id twice, or a folder without recordings.
    """
    import pandas as pd

    names = {"audio": audio_column, "text": text_column}
    if isinstance(source, pd.DataFrame):
        return _checked(_rows(_frame(source), names, "the DataFrame", None), "the DataFrame")
    listed = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(listed, Sequence) or not all(isinstance(each, str | os.PathLike) for each in listed):
        raise UsageError(f"recordings come from {SOURCES}")
    paths = [path for each in listed for path in _matches(os.fspath(each))]
    loose = [path for path in paths if not os.path.isdir(path) and not path.lower().endswith(TABLES)]
    others = [path for path in paths if path not in loose]
    found = [_loose(loose)] if loose else []
    for path in others:
        refs = _folder(path) if os.path.isdir(path) else _rows(_table(path, names), names, path, path)
        several = len(others) + bool(loose) > 1
        prefix = f"{Path(path).resolve().name}/" if several else ""
        found.append([replace(ref, id=prefix + ref.id) for ref in refs])
    return _checked([ref for refs in found for ref in refs], ", ".join(paths[:3]))


def file_stem(id: str) -> str:
    """Return a relative path that files made of a recording can be named by: different for different ids.

    Example:
        >>> file_stem("a/b c.wav"), file_stem("../x")
        ('a/b c.wav', '%2E%2E/x')
    """
    parts = []
    for part in id.split("/"):
        safe = "".join(
            c if c.isalnum() or c in KEPT else quote(c, "", errors="surrogateescape") for c in part
        )
        safe = safe or "%"
        if safe.startswith("."):  # hidden files, and the folders . and ..
            safe = safe.replace(".", "%2E")
        if len(safe.encode()) > LONGEST_NAME:
            digest = hashlib.sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            safe = f"{safe.encode()[: LONGEST_NAME - 20].decode(errors='ignore')}%~{digest}"
        parts.append(safe)
    return "/".join(parts)


def _matches(path: str) -> list[str]:
    if os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise UsageError(f"no recordings at {path}: there is no such file, folder or pattern")
    return found


def _loose(paths: Sequence[str]) -> list[AudioRef]:
    whole = [os.path.abspath(path) for path in paths]
    base = os.path.dirname(whole[0]) if len(whole) == 1 else os.path.commonpath(map(os.path.dirname, whole))
    return [AudioRef(os.path.relpath(path, base), path) for path in whole]


def _folder(path: str) -> list[AudioRef]:
    """Walk a folder; no file is opened."""

    def failed(error: OSError) -> None:
        raise DataError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    found = []
    for place, folders, names in os.walk(path, onerror=failed):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                whole = os.path.join(place, name)
                found.append(AudioRef(os.path.relpath(whole, path), os.path.abspath(whole)))
    if not found:
        raise DataError(f"{path} holds no recordings (no file with a suffix like .wav, .flac or .mp3)")
    return sorted(found, key=lambda ref: ref.id)


def _table(path: str, names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Read a manifest's columns; bytes stay where they are."""
    import pyarrow as pa

    lower = path.lower()
    try:
        if lower.endswith((".jsonl", ".ndjson")):
            return _json_lines(path)
        if lower.endswith((".csv", ".csv.gz")):
            from pyarrow import csv

            with csv.open_csv(path) as reader:
                columns = reader.schema.names
            types = {name: pa.string() for name in columns}
            options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
            parse = csv.ParseOptions(newlines_in_values=True)
            table = csv.read_csv(path, parse_options=parse, convert_options=options)
            return dict(zip(columns, (column.to_pylist() for column in table.columns), strict=True))
        return _parquet(path, names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _json_lines(path: str) -> dict[str, list[Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: not an object")
                rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return {name: [row.get(name) for row in rows] for name in columns}


def _parquet(path: str, names: Mapping[str, str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        wanted = [names.get(name, name) for name in COLUMNS if names.get(name, name) in schema.names]
        audio = names["audio"]
        kind = schema.field(audio).type if audio in schema.names else pa.string()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            column = f"{audio}.bytes" if pa.types.is_struct(kind) else audio
            packed = [field.name for field in kind] if pa.types.is_struct(kind) else []
            if "bytes" not in packed and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise DataError(f"{path}: the column {audio!r} holds {kind}, neither paths nor bytes")
            rest = file.read(columns=[name for name in wanted if name != audio]).to_pydict()
            return {audio: [Cell(os.path.abspath(path), column, row) for row in range(count)], **rest}
        return dict(file.read(columns=wanted).to_pydict())


def _frame(frame: pd.DataFrame) -> dict[str, list[Any]]:
    columns = {str(name): frame[name].astype(object) for name in frame.columns}
    return {name: column.where(column.notna(), None).tolist() for name, column in columns.items()}


def _rows(
    table: Mapping[str, list[Any]], names: Mapping[str, str], name: str, path: str | None
) -> list[AudioRef]:
    """Turn a manifest's rows into references."""
    audio = names["audio"]
    if audio not in table:
        have = ", ".join(list(table)[:10]) or "none"
        raise DataError(f"{name} has no column {audio!r}{did_you_mean(audio, table)} (it has {have})")
    count = len(table[audio])
    columns = [table.get(names.get(each, each), [None] * count) for each in COLUMNS]
    base = os.path.dirname(os.path.abspath(path)) if path is not None else os.getcwd()
    found = []
    for row, (place, id, text, start, end) in enumerate(zip(*columns, strict=True)):
        where = f"{name}, row {row + 1}"
        if not isinstance(place, str | bytes | Cell | None):
            raise DataError(f"{where}: {audio} is {type(place).__name__}, neither a path nor bytes")
        first, last = _seconds(start, f"{where}: start"), _seconds(end, f"{where}: end")
        part = f"#{start or 0}-{'' if end is None else end}" if (start, end) != (None, None) else ""
        own = f"{place}{part}" if isinstance(place, str) else str(row)
        whole = os.path.join(base, place) if isinstance(place, str) and place else place
        said = None if text is None else str(text)
        named = isinstance(place, str)
        found.append(AudioRef(own if id is None else str(id), whole, said, first, last, named))
    if not found:
        raise DataError(f"{name} has no rows")
    return found


def _seconds(value: object, what: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise DataError(f"{what} is {value!r}, not a number of seconds")
    return seconds


def _checked(refs: list[AudioRef], name: str) -> Listing:
    id, times = Counter(ref.id for ref in refs).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{name}: the id {id!r} stands {times} times; a column 'id' would tell the rows apart"
        )
    return Listing(refs)


def _cell(cell: Cell) -> bytes | None:
    """Read a parquet's cell."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(cell.table) as file:
        group, row = 0, cell.row
        while row >= file.metadata.row_group(group).num_rows:
            row -= file.metadata.row_group(group).num_rows
            group += 1
    value = _group(cell.table, cell.column, group)[row].as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


@lru_cache(maxsize=2)
def _group(table: str, column: str, group: int) -> Any:
    """Return a column of a row group: what a parquet file can be read by."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        return file.read_row_group(group, columns=[column]).column(0)
