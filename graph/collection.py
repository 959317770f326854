"""Many graphs in memory, or one large one: flat tensors, so that a batch is a few gathers and no loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manyheads.core.errors import DataError
from manyheads.graph.graphs import Graphs

if TYPE_CHECKING:
    from torch_geometric.data import Data

Level: TypeAlias = Literal["graph", "node"]
Index: TypeAlias = "Tensor | np.ndarray[Any, np.dtype[np.integer[Any]]] | Sequence[int]"
Part: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"  # x, edge_index and edge_attr of one graph


@dataclass(frozen=True)
class GraphSet:
    """Graphs one after another; their edges count nodes within each graph.

    Args:
        x: The nodes of all graphs in a row: categories (int64) or features (float32).
        edge_index: Sources in row 0, destinations in row 1; 0 is the first node of the edge's graph.
        nodes: Where each graph's nodes begin, and the end of the last.
        edges: Where each graph's edges begin, and the end of the last.
        edge_attr: The edges: categories or features; None where there is nothing to know of them.
        y: Targets: numbers, or classes as whole numbers; NaN where unknown.
        level: What a row of y and of weight belongs to: a graph or a node.
        weight: What each row of y counts in training.
        ids: The graphs' names; their numbers if none are given.
        node_ids: The nodes' names, where they have any.
        encoding: Encodings of the nodes.
        roles: Roles of the nodes.
        distances: Shortest paths within each graph, as in `Graphs`.

    Shape:
        x `[N]`, `[N, columns]` or `[N, features]`; edge_index `[2, E]`; nodes, edges int64 `[G + 1]`;
        edge_attr as x with E rows; y float32 `[G or N, targets]`; weight `[G or N]`; encoding `[N, k]`;
        roles `[N]`; distances `[n1 ** 2 + n2 ** 2 + ...]`.

    Raises:
        DataError: Parts do not fit together.
    """

    x: Tensor
    edge_index: Tensor
    nodes: Tensor
    edges: Tensor
    edge_attr: Tensor | None = None
    y: Tensor | None = None
    level: Level = "graph"
    weight: Tensor | None = None
    ids: Sequence[str] = ()
    node_ids: Sequence[str] | None = None
    encoding: Tensor | None = None
    roles: Tensor | None = None
    distances: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.ids):
            object.__setattr__(self, "ids", [str(i) for i in range(len(self))])
        count, nodes, edges = len(self), self.x.shape[0], self.edge_index.shape[1]
        rows = count if self.level == "graph" else nodes
        wanted = {"nodes": count + 1, "edges": count + 1, "edge_attr": edges, "y": rows, "weight": rows}
        wanted |= {"ids": count, "node_ids": nodes, "encoding": nodes, "roles": nodes}
        for name, size in wanted.items():
            part = getattr(self, name)
            if part is not None and len(part) != size:
                raise DataError(f"graphs: {name} has {len(part)} rows, and {size} are needed")
        if int(self.nodes[-1]) != nodes or int(self.edges[-1]) != edges:
            raise DataError(f"graphs: the bounds do not end at {nodes} nodes and {edges} edges")
        if self.y is not None and self.y.dim() != 2:
            raise DataError(f"graphs: y must be [rows, targets], not {list(self.y.shape)}")

    def __len__(self) -> int:
        return self.nodes.shape[0] - 1

    @property
    def sizes(self) -> Tensor:
        """Nodes of each graph, `[G]`."""
        return self.nodes.diff()

    @property
    def squares(self) -> Tensor:
        """Where each graph's distances begin, and the end of the last, `[G + 1]`."""
        return torch.nn.functional.pad(self.sizes.square().cumsum(0), (1, 0))

    @property
    def whole(self) -> bool:
        """Whether there is nothing but one graph."""
        return len(self) == 1

    def batch(self, index: Index) -> Graphs:
        """Put graphs together to what models take; targets beside it: `targets`.

        Args:
            index: Their numbers, in the order of the batch; a number may come twice.

        Raises:
            IndexError: There is no such graph.
        """
        index = self._index(index)
        rows, starts = _rows(self.nodes, index)
        edges, bounds = _rows(self.edges, index)
        shift = torch.repeat_interleave(starts[:-1], bounds.diff(), output_size=edges.shape[0])
        pairs = None if self.distances is None else self.distances[_rows(self.squares, index)[0]]
        return Graphs(
            self.x[rows],
            self.edge_index[:, edges] + shift,
            starts.int(),
            _taken(self.edge_attr, edges),
            _taken(self.encoding, rows),
            _taken(self.roles, rows),
            pairs,
        )

    def node_rows(self, index: Index) -> Tensor:
        """Return the numbers of graphs' nodes, graph after graph: the rows of a batch in this set."""
        return _rows(self.nodes, self._index(index))[0]

    def targets(self, index: Index) -> Tensor | None:
        """Return y of a batch: `[B, targets]`, or of its nodes `[n, targets]`."""
        return _taken(self.y, self._target_rows(index))

    def weights(self, index: Index) -> Tensor | None:
        """Return the weights of a batch's targets, a number a row."""
        return _taken(self.weight, self._target_rows(index))

    def select(self, index: Index) -> GraphSet:
        """Return a set of some graphs, in this order.

        Raises:
            IndexError: There is no such graph.
        """
        index = self._index(index)
        rows, nodes = _rows(self.nodes, index)
        edges, bounds = _rows(self.edges, index)
        targets = index if self.level == "graph" else rows
        return GraphSet(
            self.x[rows],
            self.edge_index[:, edges],
            nodes,
            bounds,
            _taken(self.edge_attr, edges),
            _taken(self.y, targets),
            self.level,
            _taken(self.weight, targets),
            [self.ids[i] for i in index.tolist()],
            None if self.node_ids is None else [self.node_ids[i] for i in rows.tolist()],
            _taken(self.encoding, rows),
            _taken(self.roles, rows),
            None if self.distances is None else self.distances[_rows(self.squares, index)[0]],
        )

    def with_targets(self, y: Tensor | None, weight: Tensor | None = None) -> GraphSet:
        """Return the same graphs with other targets."""
        return replace(self, y=y, weight=weight)

    @staticmethod
    def join(sets: Sequence[GraphSet]) -> GraphSet:
        """Put sets behind one another.

        Raises:
            DataError: There are none, or one has a part or a width that another has not.
        """
        if not sets:
            raise DataError("graphs: there is no set to join")
        if len({each.level for each in sets}) > 1:
            raise DataError("graphs: sets with targets of graphs and of nodes cannot be joined")
        parts: dict[str, Any] = {"level": sets[0].level}
        for name in (field.name for field in fields(GraphSet) if field.name != "level"):
            found = [getattr(each, name) for each in sets]
            there = [part is not None for part in found]
            if any(there) and not all(there):
                raise DataError(f"graphs: some sets have {name} and some have not; they cannot be joined")
            if not all(there):
                continue
            if name in ("ids", "node_ids"):
                parts[name] = [text for part in found for text in part]
            elif name in ("nodes", "edges"):
                parts[name] = _bounds(torch.cat([part.diff() for part in found]))
            else:
                parts[name] = _joined(found, name, dim=1 if name == "edge_index" else 0)
        return GraphSet(**parts)

    @staticmethod
    def of(
        parts: Iterable[Part], ids: Sequence[str] = (), y: Tensor | None = None, weight: Tensor | None = None
    ) -> GraphSet:
        """Put single graphs together: each x, edge_index and edge_attr, such as a `Molecule`.

        Raises:
            DataError: There are none, or they are of different widths.
        """
        x, edge_index, edge_attr = zip(*parts, strict=True) if (parts := list(parts)) else ((), (), ())
        if not x:
            raise DataError("graphs: there are none")
        attr = None if edge_attr[0] is None else _joined(edge_attr, "edge_attr")
        sizes = torch.tensor([[a.shape[0], e.shape[1]] for a, e in zip(x, edge_index, strict=True)])
        nodes, edges = _bounds(sizes[:, 0]), _bounds(sizes[:, 1])
        return GraphSet(
            _joined(x, "x"), _joined(edge_index, "edge_index", 1), nodes, edges, attr, y, "graph", weight, ids
        )

    @staticmethod
    def from_torch_geometric(data: Data | Iterable[Data], level: Level | None = None) -> GraphSet:
        """Take torch-geometric's graphs as they are: `manyheads.graph.torch_geometric.read`."""
        from manyheads.graph.torch_geometric import read

        return read(data, level)

    def to_torch_geometric(self, i: int) -> Data:
        """Return one graph as torch-geometric's `Data`: `manyheads.graph.torch_geometric.write`."""
        from manyheads.graph.torch_geometric import write

        return write(self, i)

    def check(self) -> GraphSet:
        """Look through the edges; returns the set.

        Raises:
            DataError: An edge names a node that its graph has not got; says which graph.
        """
        sizes = torch.repeat_interleave(self.sizes, self.edges.diff())
        wrong = ((self.edge_index < 0) | (self.edge_index >= sizes)).any(0).nonzero()
        if wrong.numel():
            edge = int(wrong[0])
            graph = int(torch.searchsorted(self.edges, edge, right=True)) - 1
            source, target = self.edge_index[:, edge].tolist()
            raise DataError(
                f"graph {self.ids[graph]!r} has {int(self.sizes[graph])} nodes, numbered from 0, and an edge "
                f"from {source} to {target}"
            )
        return self

    def _target_rows(self, index: Index) -> Tensor:
        return self._index(index) if self.level == "graph" else self.node_rows(index)

    def _index(self, index: Index) -> Tensor:
        found = torch.as_tensor(index, dtype=torch.int64, device=self.nodes.device).reshape(-1)
        if found.numel():
            low, high = (int(i) for i in found.aminmax())
            if low < 0 or high >= len(self):
                raise IndexError(f"graph {low if low < 0 else high} of a set of {len(self)}")
        return found


def _rows(bounds: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of what lies between the bounds of some graphs, in a row, and their own bounds."""
    first = bounds[index]
    sizes = bounds[index + 1] - first
    own = _bounds(sizes)
    total = int(own[-1])
    rows = torch.repeat_interleave(first - own[:-1], sizes, output_size=total)
    return rows + torch.arange(total, device=bounds.device), own


def _bounds(sizes: Tensor) -> Tensor:
    """From sizes `[G]` to bounds `[G + 1]`."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _taken(part: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if part is None else part[rows]


def _joined(parts: Sequence[Tensor], name: str, dim: int = 0) -> Tensor:
    kinds = {(part.dtype, part.shape[1:] if dim == 0 else part.shape[:1]) for part in parts}
    if len(kinds) > 1:
        (a, b), (c, d) = sorted(kinds, key=str)[:2]
        raise DataError(f"graphs: {name} is {a} {list(b)} in one and {c} {list(d)} in another")
    return torch.cat(list(parts), dim)
