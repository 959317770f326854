"""Tables of nodes and edges to one or many graphs: names to numbers, edges in both directions, no loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import place, text_of
from manyheads.graph.preprocessing import Names

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

log = logging.getLogger(__name__)

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_BETWEEN = "\x1f"  # a graph's name and a node's


@dataclass(frozen=True)
class Connected:
    """Tables whose rows lie graph after graph, in the order of the table of nodes.

    Args:
        nodes, edges: The tables.
        ids: The graphs' names.
        node_ids: The nodes' names.
        bounds: Where each graph's nodes begin, and the end of the last.
        source, target: Each edge's nodes, as rows of `nodes`.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    ids: list[str]
    node_ids: list[str]
    bounds: Numbers
    source: Numbers
    target: Numbers

    @property
    def graph_of_node(self) -> Numbers:
        """Each node's graph."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.bounds))

    @property
    def graph_of_edge(self) -> Numbers:
        """Each edge's graph."""
        return np.searchsorted(self.bounds, self.source, side="right") - 1

    def graphs(self, x: Tensor, edge_attr: Tensor | None, directed: bool) -> GraphSet:
        """Return the set.

        Args:
            x: The nodes' rows as models take them.
            edge_attr: The edges' rows likewise.
            directed: Edges are there as given, and not in both directions.
        """
        kept, source, target = self._distinct(edge_attr, directed)
        if not directed:
            back = np.flatnonzero(source != target)
            source, target = np.r_[source, target[back]], np.r_[target, source[back]]
            kept = np.r_[kept, kept[back]]
        graph = np.searchsorted(self.bounds, source, side="right") - 1
        if len(self.ids) > 1:
            order = np.argsort(graph, kind="stable")
            source, target, kept, graph = source[order], target[order], kept[order], graph[order]
        first = self.bounds[graph]
        ends = np.cumsum(np.bincount(graph, minlength=len(self.ids)))
        return GraphSet(
            x,
            torch.from_numpy(np.stack([source - first, target - first])),
            torch.from_numpy(self.bounds),
            torch.from_numpy(np.r_[0, ends]),
            None if edge_attr is None else edge_attr[torch.from_numpy(kept)],
            ids=self.ids,
            node_ids=self.node_ids,
        )

    def _distinct(self, edge_attr: Tensor | None, directed: bool) -> tuple[Numbers, Numbers, Numbers]:
        """Rows of edges, each edge once, with their nodes; what was left out is counted in the log."""
        import pandas as pd

        source, target = self.source, self.target
        low, high = (source, target) if directed else (np.minimum(source, target), np.maximum(source, target))
        pair = low * len(self.nodes) + high
        again = pd.Series(pair).duplicated(keep=False).to_numpy()
        if not again.any():
            return np.arange(len(source)), source, target
        rows = np.flatnonzero(again)
        table = pd.DataFrame({"pair": pair[rows]})
        if edge_attr is not None:
            attributes = edge_attr[torch.from_numpy(rows)].numpy()
            table = pd.concat([table, pd.DataFrame(attributes)], axis=1)
        same = table.duplicated().to_numpy()
        kept = np.delete(np.arange(len(source)), rows[same])
        distinct = len(np.unique(pair[rows]))
        if same.any():
            log.info("edges: %d rows say what another one does, and are left out", int(same.sum()))
        if (parallel := len(rows) - int(same.sum()) - distinct) > 0:
            log.info("edges: %d more than pairs of nodes, with other attributes: all stay", parallel)
        return kept, source[kept], target[kept]


def connect(nodes: pd.DataFrame, edges: pd.DataFrame, names: Names, what: tuple[str, str]) -> Connected:
    """Find the nodes that edges name.

    Args:
        nodes: With a column of ids, and of many graphs one of the graph's id.
        edges: With columns of sources and targets, and of many graphs one of the graph's id where two graphs
            have nodes of one id.
        names: What these columns are called.
        what: Names both tables in errors.

    Raises:
        DataError: A column or a cell of these is missing, a node is there twice, an edge names a node that
            is not there, or joins two graphs.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(nodes):
        raise DataError(f"{what[0]} has no rows")
    graph, ids = np.zeros(len(nodes), np.int64), [""]
    if many := names.graph in nodes.columns:
        coded = _keys(nodes, names.graph, what[0]).dictionary_encode()
        graph = coded.indices.to_numpy().astype(np.int64)
        ids = coded.dictionary.to_pylist()
    if (np.diff(graph) < 0).any():
        order = np.argsort(graph, kind="stable")
        nodes, graph = nodes.iloc[order], graph[order]
    own = _keys(nodes, names.id, what[0])
    both = many and names.graph in edges.columns
    keys = _joined(_keys(nodes, names.graph, what[0]), own) if both else own
    _refuse_twice(keys, what[0], many and not both)
    ends = []
    for name in (names.source, names.target):
        wanted = _keys(edges, name, what[1])
        wanted = _joined(_keys(edges, names.graph, what[1]), wanted) if both else wanted
        found = pc.index_in(wanted, value_set=keys)
        if found.null_count:
            _refuse_unknown(edges, wanted, found, name, what)
        ends.append(found.to_numpy().astype(np.int64))
    source, target = ends
    bounds = np.r_[0, np.cumsum(np.bincount(graph, minlength=len(ids)))]
    if (wrong := np.flatnonzero(graph[source] != graph[target])).size:
        first = int(wrong[0])
        one, other = (ids[graph[end[first]]] for end in ends)
        where = place(what[1], int(edges.index[first]))
        raise DataError(f"{where}: an edge joins graph {one!r} with graph {other!r}")
    assert isinstance(own, pa.Array)
    return Connected(nodes, edges, ids, own.to_pylist(), bounds, source, target)


def _keys(table: pd.DataFrame, name: str, what: str) -> pa.Array:
    """A column of names, none of them missing."""
    import pyarrow as pa

    text = text_of(table, name, what)
    if (gaps := text.isna()).any():
        first = place(what, int(gaps.index[int(gaps.to_numpy().argmax())]))
        raise DataError(f"{first}: column {name!r} is empty, here and in {int(gaps.sum()) - 1} more rows")
    array = pa.array(text, pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(first, second, pa.scalar(_BETWEEN, pa.large_string()))


def _refuse_twice(keys: pa.Array, what: str, across: bool) -> None:
    import pyarrow.compute as pc

    if (distinct := pc.count_distinct(keys).as_py()) == len(keys):
        return
    counts = pc.value_counts(keys)
    name = next(row["values"] for row in counts.to_pylist() if row["counts"] > 1).replace(_BETWEEN, ": ")
    hint = "; where graphs share nodes' names, the table of edges needs the graph's too" if across else ""
    raise DataError(f"{what}: {len(keys) - distinct} rows name a node again, the first is {name!r}{hint}")


def _refuse_unknown(
    edges: pd.DataFrame, wanted: pa.Array, found: pa.Array, name: str, what: tuple[str, str]
) -> None:
    row = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
    text = wanted[row].as_py().replace(_BETWEEN, ": ")
    raise DataError(
        f"{place(what[1], int(edges.index[row]))}: {name} {text!r} is no node of {what[0]}; so are those of "
        f"{found.null_count - 1} more of the {len(wanted)} edges"
    )
