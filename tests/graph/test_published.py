"""The published data sets: what they should hold, and the splits that others use."""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.io import read_planetoid_data

from manyheads.core import datasets
from manyheads.core.errors import DataError, UsageError
from manyheads.graph import published, splits
from manyheads.graph.molecules import ZINC_ATOMS
from manyheads.graph.preprocessing import Preprocessing
from manyheads.graph.published import load
from manyheads.graph.splits import Split

DATA = os.environ.get("MANYHEADS_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")

# graphs, nodes, edges of both directions, classes, tags: those of torch-geometric's table of these sets
COLLECTIONS = {
    "mutag": (188, 3371, 7442, 2, 7),
    "proteins": (1113, 43471, 162088, 2, 3),
    "imdb_binary": (1000, 19773, 193062, 2, 0),
    "enzymes": (600, 19580, 74564, 6, 3),
    "ptc": (344, 8792, 17862, 2, 19),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("molecules")


@pytest.fixture(scope="module")
def zinc(cache):
    return load("zinc", cache=cache)


def sizes(parts):
    return [len(parts[name]) for name in ("train", "val", "test")]


@pytest.mark.parametrize("dataset", datasets.datasets("graph"), ids=lambda dataset: dataset.name)
def test_files_are_those_of_the_table(dataset):
    place = datasets.locate(dataset.name)
    folder = place if place.is_dir() else place.parent
    for file in dataset.files:
        path = folder / Path(file.path).name
        content = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        assert len(content) == file.size
        assert hashlib.sha256(content).hexdigest() == file.sha256


def test_every_set_of_the_table_is_read_or_a_form_of_one():
    names = {dataset.name for dataset in datasets.datasets("graph")}
    assert names - set(published.NAMES) == {"zinc_jtnn", "cora_planetoid"}
    assert set(published.NAMES) <= names


def test_zinc(zinc):
    graphs, parts, about = zinc
    assert sizes(parts) == [10000, 1000, 1000]
    table = pd.read_parquet(datasets.locate("zinc") / "test_1000.parquet")
    test = graphs.select(parts["test"])
    assert test.sizes.tolist() == table["num_atoms"].tolist()
    np.testing.assert_array_equal(test.y[:, 0], table["y"].to_numpy(np.float32))
    assert test.ids[:2] == ["test/0", "test/1"]
    assert float(graphs.sizes.float().mean()) == pytest.approx(23.1, abs=0.1)
    assert float(graphs.edges.diff().float().mean()) == pytest.approx(2 * 24.9, abs=0.1)
    # the first twenty types by frequency in the lists that these molecules are of: nearly so here
    counts = graphs.x.bincount(minlength=28)
    assert counts[:18].sum() >= len(graphs.x) - 3
    assert [ZINC_ATOMS[i] for i in counts.argsort(descending=True)[:6]] == ["C", "N", "O", "C H1", "S", "F"]
    assert graphs.edge_attr.unique().tolist() == [1, 2, 3]
    assert about.model_inputs() == {"node_types": [28], "edge_types": [4], "outputs": 1}
    y = graphs.y[parts["train"]].double()
    assert about.target.mean == (pytest.approx(float(y.mean())),)
    assert about.target.std == (pytest.approx(float(y.std(unbiased=False))),)


def test_zinc_again_is_read_from_the_cache(zinc, cache, monkeypatch):
    monkeypatch.setattr("manyheads.graph.conversion.smiles_to_graph", None)
    graphs, _, about = load("zinc", cache=cache)
    assert about == zinc.preprocessing
    assert torch.equal(graphs.x, zinc.graphs.x)
    assert torch.equal(graphs.edge_index, zinc.graphs.edge_index)
    again = load("zinc", Split("random", seed=1), cache=cache)
    assert sizes(again.parts) == [9600, 1200, 1200]


@pytest.mark.slow
def test_every_molecule_of_zincs_lists_has_known_atoms():
    folder = datasets.locate("zinc_jtnn")
    count = 0
    for name in ("jtnn_valid_24445.smi.gz", "jtnn_test_5000.smi.gz"):
        with gzip.open(folder / name, "rt") as file:
            for line in file:
                count += len(published.convert([line.split()[0]], "zinc").graphs)
    assert count == 29445


def test_cora_is_planetoids(tmp_path):
    graphs, parts, about = load("cora")
    with zipfile.ZipFile(datasets.locate("cora_planetoid")) as file:
        file.extractall(tmp_path)
    theirs = read_planetoid_data(str(tmp_path), "cora")
    assert torch.equal(graphs.x, theirs.x)
    assert torch.equal(graphs.y[:, 0].long(), theirs.y)
    ours = graphs.edge_index[:, (graphs.edge_index[0] * 2708 + graphs.edge_index[1]).argsort()]
    order = (theirs.edge_index[0] * 2708 + theirs.edge_index[1]).argsort()
    assert torch.equal(ours, theirs.edge_index[:, order])
    for name in ("train", "val", "test"):
        assert sorted(parts[name].tolist()) == theirs[f"{name}_mask"].nonzero().flatten().tolist()
    assert sizes(parts) == [140, 500, 1000]
    assert about.model_inputs() == {"node_features": 1433, "outputs": 7}
    x = about.encode(graphs).x
    torch.testing.assert_close(x.sum(1), torch.ones(2708))
    assert Preprocessing.from_json(about.to_json()) == about


def test_cora_otherwise_divided():
    parts = load("cora", Split("folds", fold=2)).parts
    assert sum(sizes(parts)) == 2708


@pytest.mark.parametrize("name", COLLECTIONS)
def test_collections(name):
    count, nodes, edges, classes, tags = COLLECTIONS[name]
    graphs, parts, about = load(name)
    assert (len(graphs), graphs.x.shape[0], graphs.edge_index.shape[1]) == (count, nodes, edges)
    assert about.target.outputs == classes
    assert about.model_inputs() == {"node_types": [tags + 1], "outputs": classes}
    assert sum(sizes(parts)) == count
    tested = []
    folds = range(10) if count < 500 else (0, 5, 9)
    for fold in folds:
        tested += load(name, Split(fold=fold)).parts["test"].tolist()
    # a few graphs are in training always
    assert len(tested) == len(set(tested)) == count // 10 * len(folds)


def test_collections_first_graph_and_fold():
    """MUTAG's file begins `23 2`, `2 2 1 13`: a node of tag 2 beside nodes 1 and 13."""
    graphs, parts, about = load("mutag")
    assert int(graphs.sizes[0]) == 23
    assert about.target.classes[int(graphs.y[0])] == "2"
    assert about.node_columns[0].categories[int(graphs.x[0])] == "2"
    first = graphs.edge_index[:, : int(graphs.edges[1])]
    assert first[1, first[0] == 0].tolist() == [1, 13]
    assert parts["test"][:3].tolist() == sorted(parts["test"].tolist())[:3]
    assert {109, 126, 182} <= set(parts["test"].tolist())
    with pytest.raises(UsageError, match="no fold 10"):
        load("mutag", Split(fold=10))


def test_esol(cache):
    graphs, parts, about = load("esol", cache=cache)
    assert (len(graphs), sizes(parts)) == (1128, [902, 113, 113])
    assert about.features == "ogb"
    table = pd.read_csv(datasets.locate("esol"))
    np.testing.assert_allclose(graphs.y[:, 0], table.iloc[:, 8], rtol=1e-6)
    names = splits.scaffolds(table["smiles"].tolist())
    own = [{names[i] for i in part.tolist()} for part in parts.values()]
    assert not own[0] & own[1] | own[1] & own[2] | own[0] & own[2]
    assert sizes(load("esol", Split("random"), cache=cache).parts) == [902, 113, 113]


@pytest.mark.slow
def test_tox21_and_hiv(cache, caplog):
    graphs, parts, about = load("tox21", cache=cache)
    assert (len(graphs), sizes(parts)) == (8006, [6404, 801, 801])
    assert "8 of 8014 rows are left out" in caplog.text
    assert about.target.kind == "multilabel"
    assert graphs.y.shape == (8006, 12)
    assert 0 < float(graphs.y.isnan().float().mean()) < 0.5
    with pytest.raises(DataError, match="line 1332: not a molecule"):
        load("tox21", errors="error", cache=cache)
    graphs, parts, about = load("hiv", cache=cache)
    assert (len(graphs), sizes(parts)) == (41906, [33524, 4191, 4191])
    assert about.target.names == ("HIV_active",)
    assert int(graphs.y.sum()) == 1487


def test_names_are_suggested():
    with pytest.raises(UsageError, match="no data set 'zink' of graphs; did you mean 'zinc'"):
        load("zink")
