"""Graphs by name, of one's own tables, of torch-geometric: parts, targets, what the model folder keeps."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data, InMemoryDataset

from manyheads.core.errors import DataError, UsageError
from manyheads.graph.collection import GraphSet
from manyheads.graph.data import Encodings, GraphData, Labels, Loading, Molecules, Split
from manyheads.graph.memory import describe
from manyheads.graph.preprocessing import Preprocessing, Target

DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCC", "C1CCCCC1", "CO", "c1ccncc1", "CCCl", "CC#N"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the cache is this test's alone."""
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@needs_data
def test_esol_by_scaffold_standardised_and_encoded_once(tmp_path: Path) -> None:
    data = GraphData("esol", encoding=Encodings("random_walk", 6))
    assert {name: len(part) for name, part in data.model_inputs.items() if isinstance(part, list)} == {
        "node_types": 9,
        "edge_types": 3,
    }
    assert (data.level, data.kind, data.model_inputs["encoding_dim"]) == ("graph", "regression", 6)
    assert {name: len(rows) for name, rows in data.parts.items()} == {"train": 902, "val": 113, "test": 113}
    train = data.targets("train")
    target = data.prepared.target
    assert target.mean is not None
    assert target.std is not None
    assert target.mean[0] == pytest.approx(float(train.mean()))
    assert target.std[0] == pytest.approx(float(train.std(unbiased=False)), rel=1e-5)
    assert Preprocessing.from_json(data.preprocessing()) == data.prepared  # type: ignore[arg-type]
    assert len(list((tmp_path / "cache" / "encodings").iterdir())) == 1
    again = GraphData("esol", encoding=Encodings("random_walk", 6))
    again.setup()
    assert again.graphs.encoding is not None
    assert data.graphs.encoding is not None
    assert torch.equal(again.graphs.encoding, data.graphs.encoding)
    plain = GraphData("esol", standardise=False)
    plain.setup()
    assert plain.prepared.target.mean is None


@needs_data
def test_cora_is_one_graph_of_labelled_nodes() -> None:
    data = GraphData("cora")
    (batch,) = data.train_dataloader()
    assert (batch["graphs"].nodes, len(batch["target"])) == (2708, 140)
    assert batch["rows"] is not None
    rows = batch["rows"]
    assert torch.equal(batch["target"], data.targets("train"))
    torch.testing.assert_close(batch["graphs"].x[rows].sum(1), torch.ones(140))  # normalised
    assert len(data.ids("test")) == 1000
    assert data.classes == ("0", "1", "2", "3", "4", "5", "6")
    sampled = GraphData("cora", loading=Loading(batch_size=50, fanouts=[5, 5]))
    batches = list(sampled.train_dataloader())
    assert [len(each["target"]) for each in batches] == [50, 50, 40]
    assert sampled.prepared.fanouts == (5, 5)
    assert max(each["graphs"].nodes for each in batches) < 1000


def table(folder: Path) -> Path:
    """A table of twenty molecules, one of which is none, with two numbers that have gaps."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"mol": SMILES * 2, "name": [f"m{i}" for i in range(20)]})
    frame["a"], frame["b"] = rng.normal(size=20), rng.normal(5, 2, size=20)
    frame.loc[3, "a"] = np.nan
    frame.loc[7, "mol"] = "C("
    frame["part"] = (["train"] * 6 + ["val", "test"] * 2) * 2
    path = folder / "mine.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture
def own(tmp_path: Path) -> GraphData:
    """Data of one's own table."""
    from manyheads.graph.data import Names

    return GraphData(
        str(table(tmp_path)),
        split=Split("column", column="part"),
        columns=Names(smiles="mol", id="name"),
        targets=Labels(["a", "b"]),
        molecules=Molecules("ogb", "skip"),
    )


def test_a_table_of_ones_own(own: GraphData) -> None:
    assert list(own.names) == ["a", "b"]
    assert {name: len(rows) for name, rows in own.parts.items()} == {"train": 12, "val": 4, "test": 3}
    assert own.ids("test") == ["m9", "m17", "m19"]  # m7 is no molecule
    assert own.targets("train").isnan().sum() == 1
    assert own.path.name == "mine.csv"


def test_what_cannot_be_is_refused(own: GraphData, tmp_path: Path) -> None:
    strict = GraphData(str(table(tmp_path)), columns=own.columns, targets=Labels(["a"]))
    with pytest.raises(DataError, match="line 9: not a SMILES"):
        strict.setup()
    with pytest.raises(UsageError, match=r"no data set, table or folder 'esl'.*'esol'"):
        GraphData("esl").setup()
    with pytest.raises(UsageError, match=r"raise loading\.max_nodes"):
        GraphData.of(
            own_graphs(own), own.prepared.target, own.parts, own.prepared, loading=Loading(max_nodes=4)
        ).train_dataloader()
    for wrong in ({"batch_size": 0}, {"max_nodes": -1}, {"buckets": 0}):
        with pytest.raises(UsageError, match="loading"):
            Loading(**wrong)
    with pytest.raises(DataError, match="no targets"):
        GraphData.of(replace(own_graphs(own), y=None), own.prepared.target, own.parts).setup()


def own_graphs(data: GraphData):  # type: ignore[no-untyped-def]
    data.setup()
    return data.graphs


class Rings(InMemoryDataset):
    """Rings and paths of torch-geometric: two classes."""

    def __init__(self, count: int = 40) -> None:
        super().__init__(None)
        self.data, self.slices = self.collate([self.one(i) for i in range(count)])

    @staticmethod
    def one(i: int) -> Data:
        size = 4 + i % 5
        path = torch.stack([torch.arange(size - 1), torch.arange(1, size)])
        ring = torch.tensor([[size - 1], [0]])
        edges = torch.cat([path, ring], 1) if i % 2 else path
        x = torch.ones(size, 1, dtype=torch.int64)
        return Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], 1), y=torch.tensor([i % 2]))


def test_an_in_memory_dataset_of_torch_geometric() -> None:
    data = GraphData.from_torch_geometric(Rings(), "classification", Split("folds", folds=4))
    assert {name: len(rows) for name, rows in data_parts(data).items()} == {
        "train": 20,
        "val": 10,
        "test": 10,
    }
    assert data.targets("test").sum() == 5  # as many of each class
    assert (data.level, data.classes) == ("graph", ("0", "1"))
    assert data.model_inputs["outputs"] == 2
    batch = next(iter(data.train_dataloader()))
    assert batch["graphs"].x.dtype == torch.int64
    with pytest.raises(UsageError, match="from memory"):
        _ = data.path


def data_parts(data: GraphData):  # type: ignore[no-untyped-def]
    data.setup()
    return data.parts


def test_a_graph_with_masks_of_torch_geometric() -> None:
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :6], mask[1, 6:8], mask[2, 8:] = True, True, True
    graph = Data(
        x=torch.rand(12, 3),
        edge_index=torch.randint(0, 12, (2, 40)),
        y=torch.arange(12) % 3,
        train_mask=mask[0],
        val_mask=mask[1],
        test_mask=mask[2],
    )
    data = GraphData.from_torch_geometric(graph, "classification")
    assert data_parts(data)["test"].tolist() == [8, 9, 10, 11]
    assert data.level == "node"
    assert data.model_inputs == {"node_features": 3, "outputs": 3}
    drawn = GraphData.from_torch_geometric(graph, "classification", Split("random", (0.5, 0.25, 0.25)))
    assert len(data_parts(drawn)["test"]) == 3
    with pytest.raises(DataError, match="whole numbers"):
        GraphData.from_torch_geometric(
            Data(x=graph.x, edge_index=graph.edge_index, y=graph.x[:, :1]), "classification"
        )


def test_what_graphs_in_memory_are_made_of() -> None:
    graphs = GraphData.from_torch_geometric(Rings(4), "regression", Split("random", (0.5, 0.25, 0.25)))
    found = describe(own_graphs(graphs))
    assert [column.name for column in found.node_columns] == ["x"]
    assert replace(found, target=Target()).model_inputs()["node_types"] == [3]  # 0, 1 and any other


@pytest.mark.parametrize(("edges", "directed"), [([[0, 1], [1, 2]], True), ([[0, 1], [1, 0]], False)])
def test_edges_without_the_ones_back_are_directed(edges: list[list[int]], directed: bool) -> None:
    from torch_geometric.data import Data

    graph = Data(x=torch.rand(3, 2), edge_index=torch.tensor(edges), y=torch.tensor([0, 1, 0]))
    graphs = GraphSet.from_torch_geometric([graph, graph], "node")
    assert describe(graphs).directed is directed
