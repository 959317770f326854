"""What a predictor is given: files or a DataFrame, cut into shards of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.core import predictor as core
from manyheads.core.errors import UsageError
from manyheads.core.tables import stem_of
from manyheads.timeseries import sources
from manyheads.timeseries.sources import File, Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Shard:
    """Some records, and the files that they lie in."""

    files: tuple[File, ...]
    runs: tuple[tuple[int, Run], ...]  # (number of the file, place)


def open_all(
    source: core.Source, open_file: Callable[[Path, str], File], open_frame: Callable[[pd.DataFrame], File]
) -> list[File]:
    """Open what a caller gives.

    Args:
        source: Path of a CSV or parquet file, several paths, or a DataFrame.
        open_file: Opens a path; ids of its records begin with the text given beside it.
        open_frame: Takes a DataFrame.

    Raises:
        DataError: A file or its columns cannot be used.
        UsageError: It is none of these, or two files have one name.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return [open_frame(source)]
    if isinstance(source, str | Path):
        return [open_file(Path(source), "")]
    if not isinstance(source, Sequence) or not all(isinstance(each, str | Path) for each in source):
        raise UsageError("a source is a CSV or parquet path, a list of such paths, or a DataFrame")
    stems: dict[str, Path] = {}
    for path in map(Path, source):
        stem = stem_of(path)
        if stem in stems:
            raise UsageError(f"{stems[stem]} and {path} have one name, so ids would not differ; rename one")
        stems[stem] = path
    return [open_file(path, f"{stem}/" if len(stems) > 1 else "") for stem, path in stems.items()]


def cut(files: Sequence[File], size: int) -> list[Shard]:
    """Cut files into shards of `size` records, in order.

    A long file's ids are read once, to find where each series lies; its rows must stand together. A gzip
    CSV has no places to go to: each shard decompresses what lies before it; parquet serves large files.

    Raises:
        DataError: A series stands in two places.
    """
    runs = [(i, run) for i, file in enumerate(files) for run in sources.index(file)]
    return [_shard(files, runs[i : i + size]) for i in range(0, len(runs), size)]


def _shard(files: Sequence[File], runs: Sequence[tuple[int, Run]]) -> Shard:
    """Make a shard that holds its own files alone, for it is sent to worker processes."""
    number = {i: k for k, i in enumerate(dict.fromkeys(i for i, _ in runs))}
    return Shard(tuple(files[i] for i in number), tuple((number[i], run) for i, run in runs))
