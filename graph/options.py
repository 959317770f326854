"""What can be said of graph data: how they are read, what nodes are told, how batches are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from manyheads.core.errors import UsageError
from manyheads.graph.conversion import Errors
from manyheads.graph.molecules import Features
from manyheads.graph.preprocessing import EncodingKind, Level
from manyheads.graph.tables import Attributes


@dataclass(frozen=True)
class Encodings:
    """What nodes are told of where they lie.

    Args:
        kind: "laplacian", "random_walk", "degree" or "none".
        k: Columns.
        flip: Give each of the Laplacian's columns a random sign, another for every training batch.
        roles: Weisfeiler-Lehman roles, for models that embed them; 0 for none.
        distances: The largest shortest path that is told from longer ones, for models that ask; 0 for none.
    """

    kind: EncodingKind = "none"
    k: int = 0
    flip: bool = True
    roles: int = 0
    distances: int = 0


@dataclass(frozen=True)
class Loading:
    """How graphs, or nodes of one graph, are put into batches.

    Args:
        batch_size: Graphs of a batch at most; of one graph that is sampled, nodes.
        max_nodes: Nodes of a batch at most, its largest graph's times how many it has; 0 for no limit.
        buckets: Groups of like size that batches are taken from; 1 for batches by chance alone.
        fanouts: Of one graph: edges of a node that are sampled in each hop, -1 for all. Without it the model
            sees the graph as a whole, and an epoch is one step.
        workers: Processes that make batches; 0 makes them in training's own.
    """

    batch_size: int = 64
    max_nodes: int = 0
    buckets: int = 1
    fanouts: list[int] | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_nodes", 0), ("buckets", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"loading.{name} must be {least} or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Tables:
    """How tables of nodes and edges are read.

    Args:
        level: What is predicted about: "graph", "node" or "pair".
        directed: Edges lead from source to target, and not back.
        node_columns: The nodes' attributes; all columns that have no other meaning if not said.
        edge_columns: The edges' likewise.
        categories: Columns whose numbers are categories.
        row_normalise: Divide each node's features by their sum; as the data set's authors do if not said.
    """

    level: Level = "graph"
    directed: bool = False
    node_columns: list[str] | None = None
    edge_columns: list[str] | None = None
    categories: list[str] = field(default_factory=list)
    row_normalise: bool | None = None

    @property
    def attributes(self) -> Attributes:
        """What is read of nodes and edges."""
        return Attributes(self.node_columns, self.edge_columns, self.categories, self.directed)


@dataclass(frozen=True)
class Molecules:
    """How SMILES become graphs.

    Args:
        features: "zinc" or "ogb"; as the data set's authors do, or "ogb", if not said.
        bad: What a row that is no molecule is: an "error", or left out ("skip") and counted in the log; data
            sets of the list leave theirs out.
    """

    features: Features | None = None
    bad: Errors = "error"
