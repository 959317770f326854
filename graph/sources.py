"""Where graphs to be predicted come from: tables of SMILES, and folders of tables of nodes and edges.

- SMILES: a CSV or parquet table with a column `smiles`, several of them, a folder of them, or a DataFrame.
  Ids are the column `id`, else the row's number from 0. Read in stretches: no table is ever in memory.
- Nodes and edges: a folder with `nodes.csv` and `edges.csv` (or `.csv.gz`, `.parquet`), which is a graph, or
  a folder of such folders, at any depth. Ids are the folders' names below the source. Where pairs of nodes
  are predicted, a table `pairs` beside them names these, as `edges` names edges.

Several sources together: ids begin with the source's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.core import predictor as core
from manyheads.core import tables
from manyheads.core.errors import DataError, UsageError
from manyheads.core.tables import CSV_ENDINGS, PARQUET_ENDINGS, Rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ENDINGS = (*CSV_ENDINGS, *PARQUET_ENDINGS)
SMILES = "a CSV or parquet table with a column of SMILES, a folder of them, a list of these, or a DataFrame"
FOLDERS = "a folder with tables `nodes` and `edges`, a folder of such folders, or a list of these"
MOST_NAMED = 3


@dataclass(frozen=True)
class Columns:
    """Columns of a table of SMILES.

    Args:
        smiles: The molecules.
        id: Their ids.
        needed: A table without ids is refused; else its rows are numbered.
    """

    smiles: str = "smiles"
    id: str = "id"
    needed: bool = False

    def wanted(self, names: Sequence[str], source: str) -> list[str]:
        """Return those that are read; raises DataError where one is missing."""
        wanted = [self.smiles, *([self.id] if self.needed or self.id in names else [])]
        tables.check_columns(source, names, wanted)
        return wanted


@dataclass(frozen=True)
class Smiles:
    """A row of a table: its id, and what its cell holds."""

    id: str
    text: object


@dataclass(frozen=True)
class Stretch:
    """Some rows of a table, of a file or of a DataFrame; ids begin with `prefix`."""

    rows: Rows | pa.Table
    first: int
    prefix: str = ""

    @property
    def count(self) -> int:
        """How many rows."""
        return self.rows.count if isinstance(self.rows, Rows) else len(self.rows)


def cut_smiles(source: core.Source, columns: Columns, size: int) -> list[Stretch]:
    """Cut tables of SMILES into stretches of `size` rows.

    Raises:
        DataError: A table cannot be read, or lacks a column.
        UsageError: There is no such source.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        table = _from_pandas(source, columns)
        return [Stretch(table.slice(i, size), i) for i in range(0, len(table), size)]
    files = [file for path in _paths(source, SMILES) for file in _tables(path)]
    names = _prefixes([Path(tables.stem_of(file)) for file in files])
    found = []
    for file, prefix in zip(files, names, strict=True):
        columns.wanted(tables.column_names(file), str(file))
        found += [Stretch(rows, rows.first, prefix) for rows in tables.cut(file, size)]
    return found


def read_smiles(stretch: Stretch, columns: Columns) -> Iterator[Smiles]:
    """Stream the rows of a stretch; a row without an id has its number.

    Raises:
        DataError: The table cannot be read any more.
    """
    if isinstance(stretch.rows, Rows):
        wanted = columns.wanted(tables.column_names(Path(stretch.rows.path)), stretch.rows.path)
        parts = tables.read_rows(stretch.rows, wanted)
    else:
        parts = iter([stretch.rows])
    number = stretch.first
    for part in parts:
        ids = part[columns.id].to_pylist() if columns.id in part.column_names else [None] * len(part)
        for text, id in zip(part[columns.smiles].to_pylist(), ids, strict=True):
            yield Smiles(f"{stretch.prefix}{number if id is None or id == '' else id}", text)
            number += 1


def _from_pandas(frame: pd.DataFrame, columns: Columns) -> pa.Table:
    import pyarrow as pa

    wanted = columns.wanted([str(name) for name in frame.columns], "the DataFrame")
    texts = {
        name: [
            None if gone else str(cell) for cell, gone in zip(frame[name], frame[name].isna(), strict=True)
        ]
        for name in wanted
    }
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in texts.items()})


def _tables(path: Path) -> list[Path]:
    """A table, or those of a folder in order of name; hidden ones, and those with _ in front, are none."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if _is_table(file))
    if not found:
        raise DataError(f"{path} holds no table ({', '.join(ENDINGS)})")
    return found


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and not file.name.startswith((".", "_")) and file.is_file()


@dataclass(frozen=True)
class Folder:
    """A graph as two tables.

    Args:
        id: Its name within the source; empty where the source is this one graph.
        nodes, edges: The tables.
    """

    id: str
    nodes: str
    edges: str


def graph_folders(source: core.Source) -> list[Folder]:
    """Find the graphs of a source; no table is opened.

    Raises:
        DataError: A folder holds no graph, or one of the two tables without the other.
        UsageError: There is no such source.
    """
    paths = _paths(source, FOLDERS)
    found = []
    for path, prefix in zip(paths, _prefixes(paths), strict=True):
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; graphs come from {FOLDERS}")
        inside = list(_walk(path))
        if not inside:
            raise DataError(f"{path} holds no graph: no folder with tables `nodes` and `edges`")
        for below, nodes, edges in inside:
            found.append(Folder(f"{prefix}{below}".rstrip("/"), nodes, edges))
    return found


def _walk(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield a folder's graphs in order of name: each name, and its tables."""
    for folder, inside, names in os.walk(path):
        inside[:] = sorted(name for name in inside if not name.startswith((".", "_")))
        pair = [_one(Path(folder), names, stem) for stem in ("nodes", "edges")]
        if all(pair):
            yield os.path.relpath(folder, path).removeprefix("."), str(pair[0]), str(pair[1])
        elif any(pair):
            there, lacking = ("nodes", "edges") if pair[0] else ("edges", "nodes")
            raise DataError(f"{folder} has a table `{there}` and no table `{lacking}`")


def pairs_of(folder: Folder) -> Path:
    """Return the table `pairs` beside a graph's tables.

    Raises:
        DataError: There is none, or several.
    """
    path = Path(folder.nodes).parent
    found = _one(path, [each.name for each in path.iterdir()], "pairs")
    if found is None:
        raise DataError(f"{path} has no table `pairs`, of the pairs of nodes to be predicted")
    return found


def _one(folder: Path, names: Sequence[str], stem: str) -> Path | None:
    """The table of a name in a folder, whatever its ending."""
    found = sorted(folder / name for name in names if name.lower() in [f"{stem}{end}" for end in ENDINGS])
    if len(found) > 1:
        raise DataError(f"{folder} has several tables `{stem}`: {', '.join(file.name for file in found)}")
    return found[0] if found else None


def _paths(source: core.Source, kinds: str) -> list[Path]:
    listed = [source] if isinstance(source, str | os.PathLike) else source
    if not isinstance(listed, Sequence) or not all(isinstance(each, str | os.PathLike) for each in listed):
        raise UsageError(f"graphs come from {kinds}")
    found = [Path(each) for each in listed]
    for path in found:
        if not path.exists():
            raise UsageError(f"no file or folder {path}")
    return found


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """What the ids of each begin with: nothing where there is one alone.

    Raises:
        UsageError: Two have one name.
    """
    if len(paths) == 1:
        return [""]
    names = [f"{path.resolve().name}/" for path in paths]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"two sources are called {name[:-1]!r}, so ids would not differ; rename one")
    return names
