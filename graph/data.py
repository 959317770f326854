"""Graphs, or the nodes of one graph, to training, validation and test batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule
from torch import Tensor

from manyheads.core import datasets
from manyheads.core.buckets import Buckets
from manyheads.core.errors import DataError, UsageError, did_you_mean
from manyheads.core.loading import Schedule, share_of
from manyheads.graph import published
from manyheads.graph.collection import GraphSet
from manyheads.graph.link_parts import EDGE, LinkSet, SampledLinks, WholeLinks
from manyheads.graph.links import Links
from manyheads.graph.losses import Kind
from manyheads.graph.memory import describe, take
from manyheads.graph.options import Encodings, Loading, Molecules, Tables
from manyheads.graph.parts import (
    Batches,
    Flips,
    GraphLoader,
    ManyGraphs,
    Neighbourhoods,
    WholeGraph,
    loader,
)
from manyheads.graph.preprocessing import Encoding, Level, Names, Preprocessing, Target
from manyheads.graph.sampling import Adjacency
from manyheads.graph.splits import Part, Split
from manyheads.graph.tables import read_graphs, read_smiles
from manyheads.graph.targets import Labels, Loaded, standardised

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Encodings", "GraphData", "Labels", "Links", "Loading", "Molecules", "Names", "Split", "Tables"]


_SPLIT, _NAMES, _TARGETS, _TABLES = Split(), Names(), Labels(), Tables()
_MOLECULES, _ENCODINGS, _LOADING, _LINKS = Molecules(), Encodings(), Loading(), Links()


class GraphData(LightningDataModule):
    """Graphs: found, divided, encoded, put into batches.

    Args:
        dataset: The name of a data set (`manyheads data list`), the path of a table of SMILES, or a folder of
            tables of nodes and edges.
        seed: Of the order, the sampling and the signs.
        split: How graphs, or the nodes of one, are divided; "standard" of one's own tables is "random". Where
            pairs are predicted, how the edges of one are.
        columns: What columns of tables are called.
        targets: A table's columns of targets; data sets of the list have their own.
        tables: How tables of nodes and edges are read; the level "pair" is for data sets of one graph, too.
        molecules: How SMILES become graphs.
        encoding: What nodes are told of where they lie.
        loading: Batches.
        standardise: Train numbers standardised by the training part; figures are in the data's units always.
        links: What is asked for where pairs are predicted.
    """

    def __init__(
        self,
        dataset: str = "zinc",
        seed: int = 0,
        split: Split = _SPLIT,
        columns: Names = _NAMES,
        targets: Labels = _TARGETS,
        tables: Tables = _TABLES,
        molecules: Molecules = _MOLECULES,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
        standardise: bool = True,
        links: Links = _LINKS,
    ) -> None:
        super().__init__()
        self.dataset, self.seed, self.split, self.columns = dataset, seed, split, columns
        self.asked, self.tables, self.molecules = targets, tables, molecules
        self.encoding, self.loading, self.standardise = encoding, loading, standardise
        self.links = links
        self._given: Loaded | None = None
        self._link_set: LinkSet | None = None
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
        about = replace(prepared or describe(graphs), level=graphs.level, target=target)
        found._given = Loaded(graphs, dict(parts), about)
        return found

    @classmethod
    def from_torch_geometric(
        cls,
        dataset: Data | Iterable[Data],
        kind: Kind,
        split: Split = _SPLIT,
        seed: int = 0,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
    ) -> GraphData:
        """Take torch-geometric's graphs: an `InMemoryDataset`, a list of `Data`, or one of them.

        Args:
            dataset: With y; what it belongs to is seen by its rows.
            kind: What y is; NaN is unknown.
            split: How they are divided; "standard" takes a graph's train_mask, val_mask and test_mask, and is
                "random" where there are none.
            seed, encoding, loading: As above.

        Raises:
            DataError: They cannot be taken; says why.

        Example:
            >>> data = GraphData.from_torch_geometric(TUDataset(root, "MUTAG"), "classification")
            >>> Trainer(max_epochs=9).fit(GraphTask.of(data, "gine"), datamodule=data)
        """
        graphs, target, parts = take(dataset, kind, split)
        return cls.of(graphs, target, parts, None, seed, encoding, loading)

    @classmethod
    def of_links(
        cls,
        graphs: GraphSet,
        split: Split = _SPLIT,
        links: Links = _LINKS,
        prepared: Preprocessing | None = None,
        seed: int = 0,
        encoding: Encodings = _ENCODINGS,
        loading: Loading = _LOADING,
    ) -> GraphData:
        """Take one graph that is in memory, to predict which pairs of its nodes are joined; as `of`.

        Example:
            >>> data = GraphData.of_links(GraphSet.from_torch_geometric(Planetoid(root, "Cora")))
        """
        tables = Tables(level="pair")
        found = cls("memory", seed, split, tables=tables, encoding=encoding, loading=loading, links=links)
        found._given = Loaded(graphs, {}, prepared or describe(graphs))
        return found

    def setup(self, stage: str | None = None) -> None:
        """Find, divide and encode the graphs; once, whatever the stage.

        Raises:
            DataError: What is wrong with the data.
        """
        if self._ready:
            return
        found = self._given or self._find()
        if self.tables.level == "pair":
            self._link_set = LinkSet.of(found.graphs, self.split, found.preprocessing.directed)
            about = replace(found.preprocessing, level="pair", target=EDGE)
            found = Loaded(self._link_set.seen, {}, about)
        elif found.graphs.y is None:
            raise DataError(f"{self.dataset}: the graphs have no targets")
        self.graphs, self.parts = found.graphs, found.parts
        normalise = self.tables.row_normalise
        normalise = found.preprocessing.row_normalise if normalise is None else normalise
        self.prepared = replace(
            found.preprocessing,
            row_normalise=normalise,
            target=self._standardised(found.preprocessing.target),
            encoding=Encoding(self.encoding.kind, self.encoding.k),
            roles=self.encoding.roles,
            distances=self.encoding.distances,
            fanouts=None if self.loading.fanouts is None else tuple(self.loading.fanouts),
        )
        self.graphs = self.prepared.encode(found.graphs, datasets.cache_folder() / "encodings")
        self._ready = True

    def _find(self) -> Loaded:
        known = self.molecules
        if self.dataset in published.NAMES:
            return published.load(self.dataset, self.split, known.features)
        path, tables = Path(self.dataset), self.tables
        if not path.exists():
            close = did_you_mean(self.dataset, published.NAMES)
            raise UsageError(f"no data set, table or folder {self.dataset!r}{close} (manyheads data list)")
        if path.is_dir():
            labels = None if tables.level == "pair" else self.asked
            return read_graphs(path, labels, self.split, tables.level, tables.attributes, self.columns)
        cache = datasets.cache_folder() / "molecules"
        features = known.features or "ogb"
        return read_smiles(path, self.asked, self.split, self.columns, features, known.bad, cache)

    def _standardised(self, target: Target) -> Target:
        if target.kind != "regression":
            return target
        if not self.standardise:
            return replace(target, mean=None, std=None)
        return standardised(target.names, self._targets("train"))

    @property
    def path(self) -> Path:
        """Where the graphs come from."""
        if self._given is not None:
            raise UsageError("these graphs come from memory, not from a file")
        return datasets.locate(self.dataset) if self.dataset in published.NAMES else Path(self.dataset)

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
        if self._link_set is not None:
            return self._link_set.targets(part)
        index = self.parts[part]
        found = self.graphs.y if self.single else self.graphs.targets(index)
        assert found is not None
        return found[index] if self.single else found

    def ids(self, part: Part) -> list[str]:
        """Return the names of a part's rows."""
        self.setup()
        if self._link_set is not None:
            return self._link_set.ids(part, self.seed)
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
        train, loading = part == "train", self.loading
        flips = Flips(self.seed if train and self._flipped else None)
        share = share_of(self.trainer)
        if self._link_set is not None:
            asked = self._link_set.asked(part, self.seed, self.links.negatives)
            if loading.fanouts is None:
                hidden = self.links.hidden if train else 0.0
                return WholeLinks(self.graphs, asked, flips, hidden)
            schedule = Schedule(len(asked), loading.batch_size, train, False, self.seed, share)
            return SampledLinks(self.graphs, asked, self.adjacency, loading.fanouts, schedule, flips)
        index = self.parts[part]
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
