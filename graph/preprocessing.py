"""What lies between a graph as a user has it and what a model takes: plain data, kept in the model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.graph import columns, encodings, molecules
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.encoding_cache import cached

Input: TypeAlias = Literal["smiles", "tables"]
Level: TypeAlias = Literal["graph", "node", "pair"]
EncodingKind: TypeAlias = Literal["none", "laplacian", "random_walk", "degree"]
TargetKind: TypeAlias = Literal["regression", "classification", "multilabel"]
_CHOICES = {
    "input": ("smiles", "tables"),
    "level": ("graph", "node", "pair"),
    "encoding": ("none", "laplacian", "random_walk", "degree"),
    "target": ("regression", "classification", "multilabel"),
}


def _known(what: str, value: str) -> None:
    if value not in _CHOICES[what]:
        raise UsageError(f"graphs: no {what} {value!r} (there are {', '.join(_CHOICES[what])})")


@dataclass(frozen=True)
class Encoding:
    """Positional or structural encodings of the nodes.

    Args:
        kind: "laplacian", "random_walk", "degree" (one column a degree, the last for all larger), "none".
        k: Columns.
    """

    kind: EncodingKind = "none"
    k: int = 0

    def __post_init__(self) -> None:
        _known("encoding", self.kind)
        if (self.kind == "none") != (self.k == 0) or self.k < 0:
            raise UsageError(f"graphs: encoding {self.kind!r} cannot have {self.k} columns")


@dataclass(frozen=True)
class Target:
    """What is predicted.

    Args:
        kind: "regression" of numbers, "classification" into one of the classes, "multilabel": each of the
            names is true, false or unknown.
        names: The targets' columns; of a classification the one of the class.
        classes: A classification's classes, in the order of their numbers.
        mean, std: Of a regression's targets in the training part, where training standardises them.
    """

    kind: TargetKind = "regression"
    names: tuple[str, ...] = ("y",)
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _known("target", self.kind)
        if not self.names:
            raise UsageError("graphs: a target needs a name")
        if (self.kind == "classification") != (self.classes is not None):
            raise UsageError("graphs: a classification, and nothing else, has classes")
        if self.classes is not None and len(self.classes) < 2:
            raise DataError(f"graphs: a classification needs two classes, and there is {list(self.classes)}")

    @property
    def outputs(self) -> int:
        """Numbers that a model gives out."""
        return len(self.classes) if self.classes is not None else len(self.names)


@dataclass(frozen=True)
class Names:
    """What columns of tables are called.

    Args:
        smiles: A molecule, in a table of SMILES.
        id: A row of a table of SMILES; a node, in a table of nodes.
        graph: A node's graph, and an edge's, in tables of many graphs; a graph, in a table of graphs.
        source, target: The two nodes of an edge.
    """

    smiles: str = "smiles"
    id: str = "id"
    graph: str = "graph_id"
    source: str = "source"
    target: str = "target"


@dataclass(frozen=True)
class Preprocessing:
    """From SMILES or tables to what a model takes.

    Args:
        input: "smiles", or "tables" of nodes and edges.
        features: How SMILES become numbers: "zinc" or "ogb" (`manyheads.graph.molecules`).
        node_columns: Of tables: the nodes' columns. Without any, all nodes are of one category.
        edge_columns: Of tables: the edges' columns. Without any, edges have neither categories nor features.
        directed: Of tables: an edge is there in the direction given, and not in both.
        names: What columns are called.
        row_normalise: Divide each node's features by their sum.
        encoding: Encodings of the nodes.
        roles: Weisfeiler-Lehman roles a model embeds; larger ones are the last; 0 for none.
        distances: The largest distance that is told from larger ones; 0 for no distances.
        level: What is predicted about: graphs, nodes, or pairs of nodes.
        target: What is predicted.
        fanouts: Neighbours sampled a node and layer; None where graphs are taken whole.

    Example:
        >>> Preprocessing(features="zinc", encoding=Encoding("laplacian", 8)).model_inputs()["node_types"]
        [28]
    """

    input: Input = "smiles"
    features: molecules.Features = "ogb"
    node_columns: tuple[Column, ...] = ()
    edge_columns: tuple[Column, ...] = ()
    directed: bool = False
    names: Names = Names()
    row_normalise: bool = False
    encoding: Encoding = Encoding()
    roles: int = 0
    distances: int = 0
    level: Level = "graph"
    target: Target = Target()
    fanouts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _known("input", self.input)
        _known("level", self.level)
        molecules.types(self.features)
        if min(self.roles, self.distances) < 0 or self.roles == 1:
            raise UsageError(f"graphs: roles {self.roles}, distances {self.distances}: 0 for none, or more")

    def to_json(self) -> dict[str, Any]:
        """Return plain values: `config.json`'s `preprocessing`."""
        found: dict[str, Any] = {"input": self.input, "names": dict(vars(self.names))}
        if self.input == "smiles":
            found["features"] = self.features
        else:
            found["node_columns"] = [column.to_json() for column in self.node_columns]
            found["edge_columns"] = [column.to_json() for column in self.edge_columns]
            found["directed"] = self.directed
        target = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.target).items()}
        return found | {
            "row_normalise": self.row_normalise,
            "encoding": dict(vars(self.encoding)),
            "roles": self.roles,
            "distances": self.distances,
            "level": self.level,
            "target": target,
            "fanouts": None if self.fanouts is None else list(self.fanouts),
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Preprocessing:
        """Read it back.

        Raises:
            DataError: It is not what `to_json` writes.
        """
        try:
            parts = dict(found)
            for name in ("node_columns", "edge_columns"):
                parts[name] = tuple(Column.from_json(each) for each in parts.get(name, ()))
            parts["names"] = Names(**parts.get("names", {}))
            parts["encoding"] = Encoding(**parts["encoding"])
            target: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in parts["target"].items()
            }
            parts["target"] = Target(**target)
            parts["fanouts"] = None if parts.get("fanouts") is None else tuple(parts["fanouts"])
            return cls(**parts)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise DataError(f"graphs: this is no preprocessing of graphs: {error}") from None

    def encode(self, graphs: GraphSet, cache: Path | None = None) -> GraphSet:
        """Add encodings, roles and distances; features are normalised. What was there of these is replaced.

        Args:
            graphs: The set.
            cache: Folder of encodings computed before; none are kept if None.

        Raises:
            UsageError: A graph is too large for such an encoding, or nodes have no features to normalise.
        """
        edge_index, starts = _all_edges(graphs), graphs.nodes

        def found(encode: Callable[..., Tensor], **parameters: int) -> Tensor:
            if cache is None:
                return encode(edge_index, starts, **parameters)
            return cached(cache, encode, edge_index, starts, **parameters)

        encoding = role = distances = None
        if self.encoding.kind == "laplacian":
            encoding = found(encodings.laplacian, k=self.encoding.k)
        elif self.encoding.kind == "random_walk":
            encoding = found(encodings.random_walk, steps=self.encoding.k)
        elif self.encoding.kind == "degree":
            degree = _degree(edge_index, graphs.x.shape[0], self.encoding.k)
            encoding = torch.nn.functional.one_hot(degree, self.encoding.k).float()
        if self.roles:
            role = found(encodings.roles).clamp(max=self.roles - 1)
        if self.distances:
            distances = found(encodings.shortest_paths, most=self.distances)
        x = _row_normalised(graphs.x) if self.row_normalise else graphs.x
        return replace(graphs, x=x, encoding=encoding, roles=role, distances=distances)

    def model_inputs(self) -> dict[str, Any]:
        """Return the builder arguments that follow from the data; a builder may know fewer of them.

        Those without a use are left out: `node_types` or `node_features`, `edge_types` or `edge_features`,
        `encoding_dim`, `roles`, `max_distance`, `outputs`.
        """
        if self.input == "smiles":
            node_types, edge_types = molecules.types(self.features)
            found: dict[str, Any] = {"node_types": node_types, "edge_types": edge_types}
        else:
            types, features = columns.types(self.node_columns)
            found = {"node_types": types, "node_features": features}
            if self.edge_columns:
                types, features = columns.types(self.edge_columns)
                found |= {"edge_types": types, "edge_features": features}
        outputs = 1 if self.level == "pair" else self.target.outputs
        found |= {"encoding_dim": self.encoding.k, "roles": self.roles, "max_distance": self.distances}
        return {key: value for key, value in found.items() if value} | {"outputs": outputs}


def _all_edges(graphs: GraphSet) -> Tensor:
    """Edges that count the nodes of all graphs."""
    shift = torch.repeat_interleave(graphs.nodes[:-1], graphs.edges.diff())
    return graphs.edge_index + shift


def _degree(edge_index: Tensor, nodes: int, k: int) -> Tensor:
    if k < 2:
        raise UsageError(f"graphs: encoding 'degree' needs at least 2 columns, not {k}")
    return encodings.degree(edge_index, nodes, most=k - 1)


def _row_normalised(x: Tensor) -> Tensor:
    """A node without features stays without."""
    if not x.is_floating_point():
        raise UsageError("graphs: row_normalise is for features, and these nodes have categories")
    total = x.sum(1, keepdim=True)
    return x / total.where(total != 0, 1.0)
