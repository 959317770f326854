"""Graphs, or the nodes of one graph, to training, validation and test batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Schedule, share_of
from manyheads.graph import published
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.losses import Kind
from manyheads.graph.parts import (
    Batches,
    Flips,
    GraphLoader,
    ManyGraphs,
    Neighbourhoods,
    WholeGraph,
    loader,
)
from manyheads.graph.preprocessing import Encoding, EncodingKind, Level, Preprocessing, Target
from manyheads.graph.published import Loaded
from manyheads.graph.sampling import Adjacency
from manyheads.graph.splits import Part, Split

__all__ = ["Encodings", "GraphData", "Loading", "Split"]


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


_SPLIT, _ENCODINGS, _LOADING = Split(), Encodings(), Loading()


class GraphData(LightningDataModule):
    """Graphs: found, divided, encoded, put into batches.

    Args:
        dataset: The name of a data set (`manyheads data list`).
        seed: Of the order, the sampling and the signs.
        split: How graphs, or the nodes of one, are divided.
        encoding: What nodes are told of where they lie.
        loading: Batches.
        standardise: Train numbers standardised by the training part; figures are in the data's units always.
    """

    def __init__(
        self,
        dataset: str = "zinc",
        seed: int = 0,
        split: Split = _SPLIT,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.split = dataset, seed, split
        self.encoding, self.loading, self.standardise = encoding, loading, standardise
        self._given: Loaded | None = None
        self._adjacency: Adjacency | None = None
        self._ready = False

    @classmethod
    def of(
        cls,
        graphs: GraphSet,
        target: Target,
        parts: Mapping[Part, Tensor],
        prepared: Preprocessing | None = None,
        seed: int = 0,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
        standardise: bool = True,
    ) -> GraphData:
        """Take graphs that are in memory.

        Args:
            graphs: With targets.
            target: What the targets are.
            parts: Numbers of graphs, or of the nodes of one, as "train", "val" and "test".
            prepared: What the graphs' numbers are, for the model folder; categories, or features as they are,
                if None.
            seed, encoding, loading, standardise: As above.

        Example:
            >>> data = GraphData.of(graphs, Target("classification", ("class",), ("a", "b")), parts)
            >>> Trainer(max_epochs=9).fit(GraphTask.of(data, "gine"), datamodule=data)
        """
        found = cls("memory", seed, encoding=encoding, loading=loading, standardise=standardise)
        prepared = prepared or describe(graphs)
        about = replace(prepared, level=graphs.level, target=target)
        found._given = Loaded(graphs, dict(parts), about)
        return found

    def setup(self, stage: str | None = None) -> None:
        """Find, divide and encode the graphs; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        found = self._given or published.load(self.dataset, self.split)
        if found.graphs.y is None:
            raise DataError(f"{self.dataset}: the graphs have no targets")
        self.graphs, self.parts = found.graphs, found.parts
        self.prepared = replace(
            found.preprocessing,
            target=self._standardised(found.preprocessing.target),
            encoding=Encoding(self.encoding.kind, self.encoding.k),
            roles=self.encoding.roles,
            distances=self.encoding.distances,
            fanouts=None if self.loading.fanouts is None else tuple(self.loading.fanouts),
        )
        self.graphs = self.prepared.encode(found.graphs, datasets.cache_folder() / "encodings")
        self._ready = True

    def _standardised(self, target: Target) -> Target:
        if target.kind != "regression":
            return target
        if not self.standardise:
            return replace(target, mean=None, std=None)
        return published.standardised(target.names, self._targets("train"))

    @property
    def path(self) -> Path:
        """Where the graphs come from."""
        if self._given is not None:
            raise UsageError("these graphs come from memory, not from a file")
        return datasets.locate(self.dataset)

    @property
    def model_inputs(self) -> dict[str, int | list[int] | None]:
        """What a model is built with because of the data."""
        self.setup()
        return self.prepared.model_inputs()

    @property
    def level(self) -> Level:
        """What is predicted about."""
        self.setup()
        return self.prepared.level

    @property
    def kind(self) -> Kind:
        """What is predicted."""
        self.setup()
        return self.prepared.target.kind

    @property
    def names(self) -> Sequence[str]:
        """The targets' names."""
        self.setup()
        return self.prepared.target.names

    @property
    def classes(self) -> Sequence[str]:
        """The classes' names; none where there are no classes."""
        self.setup()
        return self.prepared.target.classes or ()

    @property
    def single(self) -> bool:
        """Whether the parts are nodes of one graph."""
        return self.graphs.level == "node" and self.graphs.whole

    def targets(self, part: Part) -> Tensor:
        """Return what is known of a part's rows, `[R, targets]`."""
        self.setup()
        return self._targets(part)

    def _targets(self, part: Part) -> Tensor:
        index = self.parts[part]
        found = self.graphs.y if self.single else self.graphs.targets(index)
        assert found is not None
        return found[index] if self.single else found

    def ids(self, part: Part) -> list[str]:
        """Return the names of a part's rows."""
        self.setup()
        index, graphs = self.parts[part], self.graphs
        if graphs.level == "graph":
            return [graphs.ids[i] for i in index.tolist()]
        rows = (index if self.single else graphs.node_rows(index)).tolist()
        return [str(i) if graphs.node_ids is None else graphs.node_ids[i] for i in rows]

    def part(self, part: Part) -> Batches:
        """Return what a part's batches are made of.

        Raises:
            UsageError: A graph does not fit into a batch.
        """
        self.setup()
        index, train, loading = self.parts[part], part == "train", self.loading
        flips = Flips(self.seed if train and self._flipped else None)
        share = share_of(self.trainer)
        if self.single and loading.fanouts is None:
            return WholeGraph(self.graphs, index, flips)
        if self.single:
            schedule = Schedule(len(index), loading.batch_size, train, False, self.seed, share)
            return Neighbourhoods(
                self.graphs, index, self.adjacency, loading.fanouts or [], schedule, self.seed, flips
            )
        graphs = self.graphs.select(index)
        sizes, limit = graphs.sizes.numpy(), loading.max_nodes or None
        if limit is not None and sizes.max() > limit:
            raise UsageError(
                f"a graph has {sizes.max()} nodes, and a batch at most {limit}: raise loading.max_nodes"
            )
        buckets = Buckets(sizes, limit, loading.buckets, train, self.seed, share, loading.batch_size)
        return ManyGraphs(graphs, buckets, flips)

    @property
    def _flipped(self) -> bool:
        return self.encoding.kind == "laplacian" and self.encoding.flip

    @property
    def adjacency(self) -> Adjacency:
        """The one graph's edges."""
        if self._adjacency is None:
            self._adjacency = Adjacency.of(self.graphs.edge_index, self.graphs.x.shape[0])
        return self._adjacency

    def train_dataloader(self) -> GraphLoader:
        """Return the training batches, others each epoch."""
        return loader(self.part("train"), self.loading.workers)

    def val_dataloader(self) -> GraphLoader:
        """Return all validation batches."""
        return loader(self.part("val"), self.loading.workers)

    def test_dataloader(self) -> GraphLoader:
        """Return all test batches."""
        return loader(self.part("test"), self.loading.workers)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new graphs as these; plain JSON."""
        self.setup()
        return self.prepared.to_json()


def describe(graphs: GraphSet) -> Preprocessing:
    """Say what graphs in memory are made of: categories as whole numbers, or features as they are."""

    def columns(part: Tensor, name: str) -> tuple[Column, ...]:
        part = part[:, None] if part.dim() == 1 else part
        if part.is_floating_point():
            return (Column(name, size=part.shape[1]),)
        most = part.max(0).values.tolist() if len(part) else [0] * part.shape[1]
        names = [name] if len(most) == 1 else [f"{name}_{i}" for i in range(len(most))]
        return tuple(Column(n, tuple(map(str, range(m + 1)))) for n, m in zip(names, most, strict=True))

    edges = () if graphs.edge_attr is None else columns(graphs.edge_attr, "edge_attr")
    return Preprocessing("tables", node_columns=columns(graphs.x, "x"), edge_columns=edges)
