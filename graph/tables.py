"""Graphs from tables: SMILES with targets, or nodes and edges.

Nodes and edges: a folder with the tables `nodes` and `edges` (csv, csv.gz or parquet), which may hold many
graphs told apart by a column `graph_id`; or a folder of such folders, a graph each. Targets of graphs, and
their split, stand in a table `graphs` beside, by `graph_id`; those of nodes in the table of nodes.
- An edge that names a node that is not there, and a node named twice, are refused.
- Where edges have no direction, each is there in both; the same edge given twice, or once from each end,
  counts once. Edges between the same nodes with other attributes stay side by side. A self-loop is one edge.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.core.tables import check_columns, column_names, kind_of, refusing_broken
from manyheads.graph import columns
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.conversion import Errors, convert
from manyheads.graph.edges import Connected, connect
from manyheads.graph.molecules import Features
from manyheads.graph.preprocessing import Names, Preprocessing, Target
from manyheads.graph.sources import ENDINGS, Folder, graph_folders
from manyheads.graph.splits import Parts, Split
from manyheads.graph.targets import Labels, Loaded, divided, standardised

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

GAPS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
NAMES = Names()
Level: TypeAlias = Literal["graph", "node", "pair"]


@dataclass(frozen=True)
class Attributes:
    """What tables of nodes and edges say of these.

    Args:
        nodes: The nodes' columns; None: all that have no other meaning.
        edges: The edges' columns likewise.
        categories: Columns whose numbers are categories.
        directed: Edges lead from source to target, and not back.
    """

    nodes: list[str] | None = None
    edges: list[str] | None = None
    categories: list[str] = field(default_factory=list)
    directed: bool = False


ATTRIBUTES, STANDARD, EDGE = Attributes(), Split(), Target("multilabel", ("edge",))


def read_table(path: Path, wanted: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a CSV or parquet table; a CSV's cells are text, and its empty ones gaps.

    Args:
        path: The file.
        wanted: The columns; all if None.

    Raises:
        DataError: It cannot be read, or has not got a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    names = column_names(path)
    check_columns(str(path), names, wanted or names)
    with refusing_broken(path):
        if kind_of(path) == "parquet":
            return pq.read_table(path, columns=wanted).to_pandas()
        table = csv.read_csv(
            path,
            csv.ReadOptions(column_names=names, skip_rows=1),
            csv.ParseOptions(),
            csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=list(wanted or names),
                null_values=list(GAPS),
                strings_can_be_null=True,
            ),
        )
    return table.to_pandas()


def read_smiles(
    path: Path,
    labels: Labels,
    split: Split = STANDARD,
    names: Names = NAMES,
    features: Features = "ogb",
    errors: Errors = "error",
    cache: Path | None = None,
) -> Loaded:
    """Read a table of molecules with targets.

    Args:
        path: CSV or parquet.
        labels: The columns of targets; rows that say nothing are in no part.
        split: How the molecules are divided; "standard" is by chance.
        names: The columns of SMILES and ids; ids are the rows' numbers where there is no such column.
        features: How SMILES become numbers.
        errors: What a row that is no molecule does: "error" stops, "skip" leaves it out and counts it.
        cache: Folder of molecules converted before.

    Raises:
        DataError: The table lacks a column, or cannot be used; says where.
        UsageError: The split cannot be had.
    """
    there, what = column_names(path), str(path)
    wanted = [names.smiles, *labels.columns, *([split.column] if split.kind == "column" else [])]
    wanted += [names.id] if names.id in there or names.id != NAMES.id else []
    table = read_table(path, list(dict.fromkeys(wanted)))
    smiles = columns.text_of(table, names.smiles, what)
    texts = [text if isinstance(text, str) else None for text in smiles]
    found = convert(texts, features, errors, cache, what)
    rows = found.rows.numpy()
    table = table.iloc[rows]
    y, target = labels.read(table, what)
    ids = [str(row) for row in rows.tolist()]
    if names.id in table.columns:
        own = columns.text_of(table, names.id, what).tolist()
        ids = [one if isinstance(one, str) else ids[i] for i, one in enumerate(own)]
    graphs = replace(found.graphs, ids=ids, y=y, weight=labels.weights(table, what))
    parts = _divide(split, table, what, y, target, [str(texts[row]) for row in rows])
    target = _standardised(target, y[parts["train"]])
    return Loaded(graphs, parts, Preprocessing(features=features, names=names, target=target))


def read_graphs(
    source: Path,
    labels: Labels | None,
    split: Split = STANDARD,
    level: Level = "graph",
    attributes: Attributes = ATTRIBUTES,
    names: Names = NAMES,
) -> Loaded:
    """Read tables of nodes and edges with targets of graphs or nodes.

    Numbers are standardised by the graphs of the training part; by all nodes where the parts are nodes of one
    graph, as training sees its other nodes too.

    Args:
        source: A folder with the tables, or a folder of such folders.
        labels: The columns of targets: of the table `graphs`, or of `nodes`; None where pairs are predicted.
        split: How graphs, or the nodes of the one graph, are divided; "standard" is by chance.
        level: What is predicted about.
        attributes: The columns of nodes and edges.
        names: What columns are called.

    Raises:
        DataError: The tables cannot be used; says where.
        UsageError: No such folder, or a split that cannot be had.
    """
    if (labels is None) != (level == "pair"):
        raise UsageError(
            "graphs: where pairs are predicted there are no columns of targets, and else there are"
        )
    found, what = _connected(graph_folders(source), names)
    asked = _Asked() if labels is None else _asked(found, what[0], source, labels, split, level, names)
    train = None
    if asked.parts and not asked.single:
        train = np.isin(np.arange(len(found.ids)), asked.parts["train"].numpy())
    for name in attributes.categories:
        if name not in found.nodes.columns and name not in found.edges.columns:
            raise UsageError(f"categories: neither {what[0]} nor {what[1]} has a column {name!r}")
    taken = {names.id, names.graph, split.column, *(labels.columns if labels else ())}
    node_columns = _fit(found.nodes, attributes.nodes, taken, what[0], train, found.graph_of_node, attributes)
    taken = {names.source, names.target, names.graph}
    edge_columns = _fit(found.edges, attributes.edges, taken, what[1], train, found.graph_of_edge, attributes)
    about = Preprocessing(
        "tables",
        node_columns=node_columns,
        edge_columns=edge_columns,
        directed=attributes.directed,
        names=names,
        level=level,
        target=asked.target,
    )
    graphs = replace(_graphs(found, about, what), level="graph" if level == "graph" else "node")
    return Loaded(replace(graphs, y=asked.y, weight=asked.weight), asked.parts, about)


@dataclass(frozen=True)
class _Asked:
    """What is predicted, and the parts: of nodes where they are those of a single graph, else of graphs."""

    target: Target = EDGE
    y: Tensor | None = None
    weight: Tensor | None = None
    parts: Parts = field(default_factory=dict)
    single: bool = False


def _asked(
    found: Connected, what: str, source: Path, labels: Labels, split: Split, level: Level, names: Names
) -> _Asked:
    single = level == "node" and len(found.ids) == 1
    rows, called = (found.nodes, what) if single else _graph_rows(source, names, found.ids)
    own, of = (found.nodes, what) if level == "node" else (rows, called)
    (y, target), weight = labels.read(own, of), labels.weights(own, of)
    one_each = single or level == "graph"  # a row of y for each row that is divided
    parts = _divide(split, rows, called, y if one_each else torch.ones(len(rows), 1), target)
    mine = parts["train"]
    if not one_each:
        mine = torch.from_numpy(np.isin(found.graph_of_node, mine.numpy()))
    return _Asked(_standardised(target, y[mine]), y, weight, parts, single)


def read_graph(nodes: str | Path, edges: str | Path, preprocessing: Preprocessing) -> GraphSet:
    """Read one graph, or the graphs of a column of their ids, as a model was trained on; not encoded.

    Nodes of one graph keep the order of the table.

    Args:
        nodes, edges: The tables.
        preprocessing: Of the model folder.

    Raises:
        DataError: The tables cannot be used; says where.
    """
    what = (str(nodes), str(edges))
    tables = read_table(Path(nodes)), read_table(Path(edges))
    return _graphs(connect(*tables, preprocessing.names, what), preprocessing, what)


def _graphs(found: Connected, about: Preprocessing, what: tuple[str, str]) -> GraphSet:
    x = columns.values(about.node_columns, found.nodes, what[0])
    attr = columns.values(about.edge_columns, found.edges, what[1]) if about.edge_columns else None
    return found.graphs(x, attr, about.directed)


def _connected(folders: Sequence[Folder], names: Names) -> tuple[Connected, tuple[str, str]]:
    """The tables of all folders as one, and what to call them."""
    import pandas as pd

    if len(folders) == 1:
        what = (folders[0].nodes, folders[0].edges)
        return connect(read_table(Path(what[0])), read_table(Path(what[1])), names, what), what
    tables: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for folder in folders:
        for path, into in zip((folder.nodes, folder.edges), tables, strict=True):
            table = read_table(Path(path))
            if names.graph in table.columns:
                raise DataError(f"{path}: a graph of a folder of its own has no column {names.graph!r}")
            table = table.assign(**{names.graph: folder.id})
            if into and set(table.columns) != set(into[0].columns):
                raise DataError(f"{path} has other columns than the tables of {folders[0].id!r}")
            into.append(table)
    what = (f"the nodes of {len(folders)} graphs", f"the edges of {len(folders)} graphs")
    nodes, edges = (pd.concat(each, ignore_index=True) for each in tables)
    return connect(nodes, edges, names, what), what


def _graph_rows(source: Path, names: Names, ids: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The rows of the table `graphs` in the order of the graphs, and its name."""
    import pandas as pd

    paths = [path for path in (source / f"graphs{ending}" for ending in ENDINGS) if path.is_file()]
    if len(paths) != 1:
        how = "no table" if not paths else "several tables"
        raise DataError(f"{source} has {how} `graphs`, with the targets or the split of each graph")
    table, what = read_table(paths[0]), str(paths[0])
    keys = pd.Index(columns.text_of(table, names.graph, what))
    if keys.has_duplicates or keys.hasnans:
        wrong = keys[keys.duplicated() | keys.isna()][0]
        raise DataError(f"{what}: column {names.graph!r} has {wrong!r} twice, or an empty cell")
    if len(ids) == 1 and ids[0] == "" and len(keys) == 1:  # the one graph of a folder has no name of its own
        return table, what
    rows = keys.get_indexer(pd.Index(ids))
    if (rows < 0).any() or len(keys) > len(ids):
        lacking = [name for name, row in zip(ids, rows, strict=True) if row < 0] or list(
            keys.difference(list(ids))
        )
        where = "no row for" if (rows < 0).any() else "a row without nodes for"
        raise DataError(f"{what} has {where} {len(lacking)} graphs, the first is {lacking[0]!r}")
    return table.iloc[rows], what


def _divide(
    split: Split,
    table: pd.DataFrame,
    what: str,
    y: Tensor,
    target: Target,
    smiles: Sequence[str] | None = None,
) -> Parts:
    """The parts among the rows of which something is known."""
    words, split = None, replace(split, kind="random") if split.kind == "standard" else split
    if split.kind == "column":
        cells = columns.text_of(table, split.column, what)
        words = cells.astype(object).where(cells.notna(), None).tolist()

    def divide(known: Tensor) -> Parts:
        rows = known.tolist()
        return split.divide(
            len(rows),
            classes=y[known, 0] if target.kind == "classification" else None,
            smiles=None if smiles is None else [smiles[i] for i in rows],
            words=None if words is None else [words[i] for i in rows],
        )

    return divided(y, divide)


def _standardised(target: Target, y: Tensor) -> Target:
    """With mean and deviation of the training part, where the target is of numbers."""
    return standardised(target.names, y) if target.kind == "regression" else target


def _fit(
    table: pd.DataFrame,
    wanted: Sequence[str] | None,
    taken: Collection[str],
    what: str,
    train: np.ndarray[Any, Any] | None,
    graph: np.ndarray[Any, Any],
    attributes: Attributes,
) -> tuple[Column, ...]:
    """Learn columns of nodes or edges, by the graphs of the training part."""
    names = [name for name in table.columns if name not in taken] if wanted is None else wanted
    rows = None if train is None else np.flatnonzero(train[graph])
    return columns.fit(table, names, what, rows, attributes.categories)
