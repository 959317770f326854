"""Graphs, or the nodes of one graph, to training, validation and test batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError
from manyheads.core.loading import Schedule, share_of
from manyheads.graph.collection import GraphSet
from manyheads.graph.losses import Kind
from manyheads.graph.parts import Flips, GraphLoader, ManyGraphs, Neighbourhoods, Part, WholeGraph, loader
from manyheads.graph.preprocessing import Encoding, EncodingKind, Level, Preprocessing, Target
from manyheads.graph.sampling import Adjacency

__all__ = ["Encodings", "GraphData", "Loading"]

Name = Literal["train", "val", "test"]


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


_ENCODINGS, _LOADING = Encodings(), Loading()


class GraphData(LightningDataModule):
    """Graphs: found, divided, encoded, put into batches.

    Args:
        dataset: `zinc`.
        seed: Of the division, the order, the sampling and the signs.
        encoding: What nodes are told of where they lie.
        loading: Batches.
    """

    def __init__(
        self,
        dataset: str = "zinc",
        seed: int = 0,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.encoding, self.loading = dataset, seed, encoding, loading
        self._ready = False

    def setup(self, stage: str | None = None) -> None:
        """Find, divide and encode the graphs; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        whole, prepared, parts = _zinc()
        prepared = replace(
            prepared,
            encoding=Encoding(self.encoding.kind, self.encoding.k),
            roles=self.encoding.roles,
            distances=self.encoding.distances,
            fanouts=None if self.loading.fanouts is None else tuple(self.loading.fanouts),
        )
        self.prepared = prepared
        self.graphs = prepared.encode(whole, datasets.cache_folder() / "encodings")
        self.parts: dict[Name, Tensor] = parts  # numbers of graphs, or of the nodes of one
        self._ready = True

    @property
    def path(self) -> Path:
        """The file that the graphs come from."""
        return Path(self.dataset)

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
    def _single(self) -> bool:
        """Whether the parts are nodes of one graph."""
        return self.prepared.level == "node" and self.graphs.whole

    def targets(self, part: Name) -> Tensor:
        """Return what is known of a part's rows, `[R, targets]`."""
        self.setup()
        index = self.parts[part]
        found = self.graphs.y if self._single else self.graphs.targets(index)
        assert found is not None
        return found[index] if self._single else found

    def ids(self, part: Name) -> list[str]:
        """Return the names of a part's rows."""
        self.setup()
        index = self.parts[part]
        if self.prepared.level == "graph":
            return [self.graphs.ids[i] for i in index.tolist()]
        rows = index if self._single else self.graphs.node_rows(index)
        names = self.graphs.node_ids
        return [str(i) if names is None else names[i] for i in rows.tolist()]

    def _part(self, part: Name) -> Part:
        self.setup()
        index, train, loading = self.parts[part], part == "train", self.loading
        if not len(index):
            raise DataError(f"{self.dataset} has nothing in the part {part!r}")
        laplacian = self.encoding.kind == "laplacian" and self.encoding.flip
        flips = Flips(self.seed if train and laplacian else None)
        share = share_of(self.trainer)
        if self._single and loading.fanouts is None:
            return WholeGraph(self.graphs, index, flips)
        if self._single:
            schedule = Schedule(len(index), loading.batch_size, train, False, self.seed, share)
            adjacency = Adjacency.of(self.graphs.edge_index, self.graphs.x.shape[0])
            assert loading.fanouts is not None
            return Neighbourhoods(self.graphs, index, adjacency, loading.fanouts, schedule, self.seed, flips)
        graphs = self.graphs.select(index)
        sizes = graphs.sizes.numpy()
        limit = loading.max_nodes or None
        if limit is not None and sizes.max() > limit:
            raise UsageError(
                f"a graph has {sizes.max()} nodes, and a batch at most {limit}: raise loading.max_nodes"
            )
        buckets = Buckets(sizes, limit, loading.buckets, train, self.seed, share, loading.batch_size)
        return ManyGraphs(graphs, buckets, flips)

    def train_dataloader(self) -> GraphLoader:
        """Return the training batches, others each epoch."""
        return loader(self._part("train"), self.loading.workers)

    def val_dataloader(self) -> GraphLoader:
        """Return all validation batches."""
        return loader(self._part("val"), self.loading.workers)

    def test_dataloader(self) -> GraphLoader:
        """Return all test batches."""
        return loader(self._part("test"), self.loading.workers)

    def preprocessing(self) -> dict[str, object]:
        """Return what a predictor needs to treat new graphs as these; plain JSON."""
        self.setup()
        return self.prepared.to_json()


def _zinc() -> tuple[GraphSet, Preprocessing, dict[Name, Tensor]]:
    """A stand-in until the published sets are read elsewhere."""
    import os

    import pandas as pd

    from manyheads.graph.molecules import smiles_to_graph

    folder = Path(os.environ["MANYHEADS_DATA"]) / "graph" / "zinc_jtnn"
    files = ("train_10000_from_valid_pool", "val_1000", "test_1000")
    tables = [pd.read_parquet(folder / f"{name}.parquet") for name in files]
    table = pd.concat(tables, ignore_index=True)
    y = torch.tensor(table["y"].to_numpy(), dtype=torch.float32)[:, None]
    graphs = GraphSet.of((smiles_to_graph(s, "zinc") for s in table["smiles"]), y=y)
    train = y[: len(tables[0])]
    target = Target("regression", ("y",), None, (float(train.mean()),), (float(train.std()),))
    ends = torch.tensor([0] + [len(t) for t in tables]).cumsum(0).tolist()
    parts = {n: torch.arange(ends[i], ends[i + 1]) for i, n in enumerate(("train", "val", "test"))}
    return graphs, Preprocessing(features="zinc", target=target), parts  # type: ignore[return-value]
