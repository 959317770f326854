"""Preprocessing: encodings of a set and of its graphs alone, plain JSON, columns of tables as numbers."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.graph import columns, encodings
from manyheads.graph.collection import GraphSet
from manyheads.graph.columns import Column
from manyheads.graph.molecules import smiles_to_graph
from manyheads.graph.preprocessing import Encoding, Names, Preprocessing, Target

SMILES = (
    "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "C", "C[C@H](N)C(=O)[O-]", "c1ccccc1.CCO",
    "CC1(C)C2CCC1(C)C(=O)C2", "C1CC1",
)  # fmt: skip
COLUMNS = (Column("kind", ("a", "b")), Column("f", None, (1.0, -2.0), (2.0, 0.5), 2))
FULL = Preprocessing(
    "tables",
    node_columns=COLUMNS,
    edge_columns=(Column("w", None, (0.0,), (3.0,)),),
    directed=True,
    names=Names(source="from", target="to"),
    encoding=Encoding("laplacian", 4),
    roles=20,
    distances=7,
    level="node",
    target=Target("classification", ("topic",), ("x", "y", "z")),
    fanouts=(5, -1),
)


@pytest.fixture(scope="module")
def graphs():
    return GraphSet.of([smiles_to_graph(each, "ogb") for each in SMILES])


@pytest.mark.parametrize(
    "about",
    [
        Preprocessing(encoding=Encoding("laplacian", 6), roles=12, distances=4),
        Preprocessing(encoding=Encoding("random_walk", 8)),
        Preprocessing(encoding=Encoding("degree", 4), distances=20),
        Preprocessing(),
    ],
    ids=["laplacian", "random_walk", "degree", "none"],
)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_a_set_is_encoded_as_its_graphs_one_by_one(graphs, about, kept, tmp_path):
    cache = tmp_path if kept else None
    whole = about.encode(graphs, cache)
    alone = GraphSet.join([about.encode(graphs.select([i]), cache) for i in range(len(graphs))])
    again = about.encode(whole, cache)
    for name in (field.name for field in fields(GraphSet)):
        one, other, third = (getattr(each, name) for each in (whole, alone, again))
        if not isinstance(one, torch.Tensor):
            assert (one is None) == (other is None) == (third is None)
        else:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=name)
            assert torch.equal(one, third)
    assert bool(list(tmp_path.iterdir())) == (
        kept and bool(about.distances or about.encoding.kind == "random_walk")
    )


def test_encodings_are_the_rooms_own(graphs):
    about = Preprocessing(encoding=Encoding("degree", 3), roles=5, distances=6)
    found = about.encode(graphs)
    batch = graphs.batch(range(len(graphs)))
    degree = encodings.degree(batch.edge_index, batch.nodes, 2)
    assert torch.equal(found.encoding.argmax(1), degree)
    assert found.encoding.sum(1).unique().tolist() == [1.0]
    assert torch.equal(found.roles, encodings.roles(batch.edge_index, batch.starts).clamp(max=4))
    assert int(found.roles.max()) == 4
    assert torch.equal(found.distances, encodings.shortest_paths(batch.edge_index, batch.starts, 6))


def test_rows_are_normalised_and_empty_rows_stay():
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 0.0]])
    graphs = GraphSet.of([(x, torch.zeros(2, 0, dtype=torch.int64), None)])
    about = Preprocessing("tables", node_columns=(Column("x", size=2),), row_normalise=True)
    found = about.encode(graphs)
    assert found.x.tolist() == [[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]]
    assert torch.equal(about.encode(found).x, found.x)
    with pytest.raises(UsageError, match="these nodes have categories"):
        about.encode(replace(graphs, x=x.long()))


@pytest.mark.parametrize(
    "about",
    [
        FULL,
        Preprocessing(),
        Preprocessing(features="zinc", target=Target("regression", ("y",), None, (1.0,), (2.0,))),
    ],
)
def test_json_and_back(about):
    text = json.dumps(about.to_json())
    assert Preprocessing.from_json(json.loads(text)) == about


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": {"kind": "laplacian"}},
        {"encoding": {"kind": "fourier", "k": 3}},
        {"encoding": None},
        {"target": {"kind": "classification", "names": ["a"]}},
        {"target": {"kind": "classification", "names": ["a"], "classes": ["x"]}},
        {"level": "edge"},
        {"colour": 1},
        {"names": {"colour": "x"}},
        {"node_columns": [{}]},
    ],
)
def test_json_that_is_none_is_refused(change):
    with pytest.raises(DataError, match=r"no preprocessing|two classes"):
        Preprocessing.from_json(FULL.to_json() | change)


def test_wrong_values_are_refused():
    for wrong in (lambda: Encoding("laplacian"), lambda: Encoding("none", 3), lambda: Target("sort")):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="no features"):
        Preprocessing(features="x")
    with pytest.raises(UsageError, match="roles 1"):
        Preprocessing(roles=1)
    with pytest.raises(UsageError, match="at least 2 columns"):
        Preprocessing(encoding=Encoding("degree", 1)).encode(
            GraphSet.of([(torch.zeros(1, 1).long(), torch.zeros(2, 0).long(), None)])
        )


def test_what_models_are_built_with():
    zinc = Preprocessing(features="zinc", encoding=Encoding("laplacian", 8))
    assert zinc.model_inputs() == {"node_types": [28], "edge_types": [4], "encoding_dim": 8, "outputs": 1}
    found = FULL.model_inputs()
    assert found.pop("max_distance") == 7
    assert found == {"node_features": 5, "edge_features": 1, "encoding_dim": 4, "roles": 20, "outputs": 3}
    assert replace(FULL, level="pair").model_inputs()["outputs"] == 1
    assert Preprocessing("tables").model_inputs() == {"node_types": [1], "outputs": 1}
    names = ("a", "b", "c")
    assert Preprocessing(target=Target("multilabel", names)).model_inputs()["outputs"] == 3
    kinds = Preprocessing("tables", node_columns=(Column("a", ("x",)), Column("b", ("u", "v"))))
    assert kinds.model_inputs()["node_types"] == [2, 3]


def test_a_model_built_so_takes_the_batches(graphs):
    about = Preprocessing(
        encoding=Encoding("random_walk", 4), roles=20, target=Target("multilabel", ("a", "b"))
    )
    model = create_model("graph_transformer", **about.model_inputs(), hidden_dim=16, L=2, n_heads=2)
    assert model(about.encode(graphs).batch([3, 0, 1])).shape == (3, 2)


def table(**cells):
    return pd.DataFrame(cells)


def test_columns_are_learnt_from_the_training_part():
    cells = table(
        kind=["a", "b", None, "c"], size=[1, 2, 3, 100], flag=[True, False, True, True], same=[5.0] * 4
    )
    found = columns.fit(cells, list(cells), "nodes", np.array([0, 1, 2]))
    assert found[0] == Column("kind", ("a", "b"))
    assert found[1].mean == (2.0,)
    assert found[1].std == pytest.approx((np.std([1, 2, 3]),))
    assert found[2] == Column("flag", ("false", "true"))
    assert found[3] == Column("same", None, (5.0,), (1.0,))
    assert columns.types(found[:1]) == ([3], 0)
    assert columns.types(found) == (None, 3 + 1 + 3 + 1)
    values = columns.values(found, cells, "nodes")
    hot = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]  # a gap and "c" are what has not been seen
    assert values[:, :3].tolist() == hot
    torch.testing.assert_close(values[:, 3], torch.tensor([-1.0, 0.0, 1.0, 98.0]) / found[1].std[0])
    assert values[:, 7].tolist() == [0.0] * 4


def test_categories_alone_are_numbers_to_embed():
    cells = table(kind=["a", "b", "z", None], code=[3, 1, 2, 7])
    found = columns.fit(cells, list(cells), "nodes", np.array([0, 1]), ["code"])
    values = columns.values(found, cells, "nodes")
    assert values.dtype == torch.int64
    assert values.tolist() == [[0, 1], [1, 0], [2, 2], [2, 2]]
    assert columns.values((), cells, "nodes").tolist() == [[0]] * 4


@pytest.mark.parametrize(
    "cells",
    [[1, 2, 30], [1.0, 2.0, 30.0], ["1", " 2", "30 "], pd.array([1, 2, 30], "Int64"), [True, False, True]],
)
def test_a_category_is_the_same_in_csv_and_parquet(cells):
    if cells[0] is True:
        text, cells = ["true", "false", "TRUE "], table(c=cells)
        text = [each.lower() for each in text]
    else:
        text, cells = ["1", "2", "30"], table(c=cells)
    (learnt,) = columns.fit(cells, ["c"], "nodes", None, ["c"])
    assert (
        columns.values((learnt,), cells, "nodes").tolist()
        == columns.values((learnt,), table(c=text), "").tolist()
    )
    assert int(columns.values((learnt,), cells, "nodes").max()) < len(learnt.categories)


def test_numbers_as_text_and_gaps():
    found = columns.fit(table(a=["1", "", "3", None]), ["a"], "nodes")
    assert found[0].mean == (2.0,)
    values = columns.values(found, table(a=["1", "", "5", None]), "nodes")
    assert values.flatten().tolist() == [-1.0, 0.0, 3.0, 0.0]  # a gap is the mean


def test_several_columns_that_belong_together():
    lists = table(f=[[1.0, 2.0], [3.0, 6.0], None])
    (learnt,) = columns.fit(lists, ["f"], "nodes")
    assert learnt == Column("f", None, (2.0, 4.0), (1.0, 2.0), 2)
    wanted = [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]
    assert columns.values((learnt,), lists, "nodes").tolist() == wanted
    apart = table(f_1=[2.0, 6.0, None], f_0=[1.0, 3.0, None])
    assert columns.values((learnt,), apart, "nodes").tolist() == wanted
    with pytest.raises(DataError, match="column 'f' has 3 numbers in a row, not 2"):
        columns.values((learnt,), table(f=[[1.0, 2.0, 3.0]]), "nodes")
    with pytest.raises(DataError, match="no column 'f_1'"):
        columns.values((learnt,), table(f_0=[1.0]), "nodes")


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (["1", "x"], "nodes: column 'a' must be of numbers: .*'x'"),
        ([1.0, float("inf")], "infinite"),
    ],
)
def test_what_is_no_number_is_named(cells, why):
    with pytest.raises(DataError, match=why):
        columns.values((Column("a"),), table(a=cells), "nodes")


def test_columns_that_cannot_be_learnt():
    with pytest.raises(DataError, match="no column 'kin'; did you mean 'kind'"):
        columns.fit(table(kind=["a"]), ["kin"], "nodes")
    with pytest.raises(DataError, match="is empty in the training part"):
        columns.fit(table(kind=[None, "a"]), ["kind"], "nodes", np.array([0]))
