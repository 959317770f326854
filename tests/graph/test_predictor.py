"""The predictor of graph models: rows, batches against single records, encodings, what is refused."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.core import hub
from manyheads.core import predictor as core
from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, UsageError
from manyheads.graph import records
from manyheads.graph.answers import Answers
from manyheads.graph.collection import GraphSet
from manyheads.graph.molecules import smiles_to_graph
from manyheads.graph.preprocessing import Encoding, Names, Preprocessing, Target
from manyheads.graph.records import cuts

ZINC = Path(os.environ.get("MANYHEADS_DATA", "")) / "graph" / "zinc_jtnn" / "jtnn_test_5000.smi.gz"
# Rings whose spectra have equal eigenvalues, one atom, two atoms, parts apart, a large one
ODD = ["C1CCCCC1", "c1ccccc1", "C", "N#N", "C.C.O.O", "C12C3C4C1C5C2C3C45", "C" * 90, "C1CCC1.C1CCC1.O"]
NAMES = ("a", "b")
REGRESSION = Target("regression", NAMES, None, (1.5, -3.0), (2.0, 0.5))
CLASSES = Target("classification", ("y",), ("no", "so so", "yes"))
LABELS = Target("multilabel", NAMES)


@pytest.fixture(scope="module")
def smiles():
    if not ZINC.is_file():
        pytest.skip("MANYHEADS_DATA has no zinc_jtnn")
    with gzip.open(ZINC, "rt") as file:
        return [line.strip() for line, _ in zip(file, range(40), strict=False)] + ODD


def folder(path, name, preprocessing, **arguments):
    """A model folder with random weights; running statistics are those of no batch."""
    torch.manual_seed(0)
    arguments = {**preprocessing.model_inputs(), **arguments}
    model = create_model(name, **arguments)
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
    hub.save(
        path, model, domain="graph", name=name, arguments=arguments, preprocessing=preprocessing.to_json()
    )
    return path


def load(path, name, preprocessing, **arguments):
    return hub.load(folder(path, name, preprocessing, **arguments))


MOLECULES = {
    "graph_transformer": (
        Preprocessing(features="zinc", encoding=Encoding("laplacian", 8), target=REGRESSION),
        {"hidden_dim": 16, "L": 2, "n_heads": 4},
    ),
    "gps": (
        Preprocessing(encoding=Encoding("random_walk", 6), target=LABELS),
        {"hidden_dim": 16, "L": 2, "n_heads": 4, "encoding_width": 4},
    ),
    "urpe": (
        Preprocessing(features="ogb", distances=8, target=CLASSES),
        {"hidden_dim": 16, "L": 2, "n_heads": 4},
    ),
    "gated_gcn": (
        Preprocessing(encoding=Encoding("degree", 5), target=CLASSES),
        {"hidden_dim": 16, "L": 3, "readout": "max"},
    ),
    "gine": (Preprocessing(features="zinc", target=REGRESSION), {"hidden_dim": 16, "L": 2}),
}


@pytest.mark.parametrize("name", MOLECULES)
def test_a_batch_is_its_molecules_one_by_one(smiles, name, tmp_path, monkeypatch):
    preprocessing, arguments = MOLECULES[name]
    predictor = load(tmp_path / "model", name, preprocessing, **arguments)
    frame = pd.DataFrame({"smiles": smiles})
    together = predictor.predict(frame)
    assert list(together.columns) == list(predictor.columns) and together.id.tolist() == [
        str(i) for i in range(len(smiles))
    ]
    alone = pd.DataFrame(core.rows(predictor, frame, batch_size=1), columns=together.columns)
    monkeypatch.setattr(records, "MOST_NODES", 60)
    pieces = predictor.predict(frame)
    for found in (alone, pieces):
        for column, kind in predictor.columns.items():
            if kind == "string":
                assert found[column].tolist() == together[column].tolist()
            else:
                np.testing.assert_allclose(found[column], together[column], atol=1e-5, rtol=1e-5)
    numbers = together.select_dtypes("number")
    assert numbers.std().gt(1e-4).all()  # molecules differ


@pytest.mark.parametrize("kind", ["laplacian", "random_walk"])
def test_encodings_depend_on_the_graph_alone(smiles, kind):
    """To the bit, with equal eigenvalues too: signs and bases must not turn with the company."""
    preprocessing = Preprocessing(features="ogb", encoding=Encoding(kind, 10), roles=9, distances=5)
    graphs = [smiles_to_graph(text) for text in smiles]
    together = preprocessing.encode(GraphSet.of(graphs))
    backwards = preprocessing.encode(GraphSet.of(graphs[::-1])).select(range(len(graphs))[::-1])
    for i, graph in enumerate(graphs):
        alone = preprocessing.encode(GraphSet.of([graph]))
        for part in ("encoding", "roles", "distances"):
            found = getattr(alone, part)
            assert torch.equal(found, getattr(together.select([i]), part))
            assert torch.equal(found, getattr(backwards.select([i]), part))


def test_bad_molecules_are_set_aside(tmp_path):
    predictor = load(tmp_path / "model", "gine", MOLECULES["gine"][0], hidden_dim=16, L=2)
    frame = pd.DataFrame({"smiles": ["CCO", "C(", None, "C1CC", "[U]", "CC(C)(C)(C)C", "N", "C C"]})
    (shard,) = predictor.shards(frame, 100)
    ((rows, bad, taken),) = core.run(predictor, predictor.read(shard), 100)
    assert taken == 8 and [row["id"] for row in rows] == ["0", "6"]
    assert [each.id for each in bad] == ["1", "2", "3", "4", "5", "7"]
    reasons = [each.reason for each in bad]
    for reason, words in zip(
        reasons, ("not a SMILES: 'C('", "no SMILES", "'C1CC'", "'U'", "valence", "blank"), strict=True
    ):
        assert words in reason
    with pytest.raises(DataError, match=r"record '1': not a SMILES: 'C\('"):
        predictor.predict(frame)


def test_rows_of_each_kind():
    outputs = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    answers = Answers(REGRESSION)
    assert answers.columns == {"id": "string", "a": "float32", "b": "float32"}
    assert answers.rows(outputs, ["x", "y"]) == [
        {"id": "x", "a": 1.5, "b": -2.0},
        {"id": "y", "a": 3.5, "b": -3.5},
    ]
    plain = Answers(replace(REGRESSION, mean=None, std=None))
    assert plain.rows(outputs, ["x", "y"])[0] == {"id": "x", "a": 0.0, "b": 2.0}
    (first, _) = Answers(LABELS).rows(outputs, ["x", "y"])
    assert first == {"id": "x", "a": 0.5, "b": pytest.approx(1 / (1 + np.exp(-2.0)))}
    three = torch.tensor([[0.0, 2.0, 1.0]])
    p = np.exp([0, 2, 1]) / np.exp([0, 2, 1]).sum()
    assert Answers(CLASSES).columns == {"id": "string", "label": "string", "probability": "float32"}
    assert Answers(CLASSES).rows(three, ["x"]) == [
        {"id": "x", "label": "so so", "probability": pytest.approx(p[1])}
    ]
    every = Answers(CLASSES, "probabilities")
    assert list(every.columns)[3:] == ["probability_no", "probability_so so", "probability_yes"]
    (row,) = every.rows(three, ["x"])
    assert list(row) == list(every.columns) and list(row.values())[3:] == pytest.approx(p.tolist())


def test_rows_refused():
    with pytest.raises(UsageError, match=r"no output kind 'labels'; did you mean 'label'\?"):
        Answers(CLASSES, "labels")
    with pytest.raises(UsageError, match="probabilities is for classes; this model's are numbers"):
        Answers(REGRESSION, "probabilities")
    with pytest.raises(DataError, match="two columns 'id' of a row"):
        Answers(Target("regression", ("id",)))
    with pytest.raises(DataError, match=r"mean 0\.0 and the deviation 0.0"):
        Answers(Target("regression", ("y",), None, (0.0,), (0.0,)))
    with pytest.raises(DataError, match=r"gives \[1, 3\] numbers, its folder says \[1, 2\]"):
        Answers(LABELS).rows(torch.zeros(1, 3), ["x"])
    with pytest.raises(DataError, match="no finite number for 'y'"):
        Answers(LABELS).rows(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), ["x", "y"])


def test_settings_by_model(tmp_path):
    classifier = load(tmp_path / "a", "gated_gcn", MOLECULES["gated_gcn"][0], hidden_dim=16, L=2)
    assert classifier.settings == {"output_kind": "label", "smiles_column": "smiles", "id_column": "id"}
    frame = pd.DataFrame({"structure": ["CC", "CO"], "key": ["x", "y"]})
    found = classifier.predict(frame, "probabilities", smiles_column="structure", id_column="key")
    each = [f"probability_{name}" for name in CLASSES.classes]
    assert found.columns.tolist() == ["id", "label", "probability", *each] and found.id.tolist() == ["x", "y"]
    np.testing.assert_allclose(found[each].sum(axis=1), 1, atol=1e-6)
    assert (found[each].max(axis=1) == found.probability).all()
    with pytest.raises(UsageError, match="--neighbours is no option of this model"):
        classifier.predict(frame, neighbours="all")
    named = replace(MOLECULES["gated_gcn"][0], names=Names(smiles="structure", id="key"))
    own = load(tmp_path / "c", "gated_gcn", named, hidden_dim=16, L=2)
    assert own.settings["smiles_column"] == "structure"
    pd.testing.assert_frame_equal(own.predict(frame, "probabilities"), found)
    assert own.predict(frame[["structure"]]).id.tolist() == ["0", "1"]
    numbers = load(tmp_path / "b", "gine", MOLECULES["gine"][0], hidden_dim=16, L=2)
    assert numbers.settings == {"smiles_column": "smiles", "id_column": "id"}
    with pytest.raises(UsageError, match="--output-kind is no option of this model"):
        numbers.predict(frame, "probabilities")


def test_folders_that_do_not_fit(tmp_path):
    of = Preprocessing(features="zinc", target=REGRESSION)
    with pytest.raises(DataError, match="predicts of each graph, its model of each node"):
        load(tmp_path / "a", "gine", of, hidden_dim=16, readout="node")
    with pytest.raises(DataError, match=r"data has node_types \[28\], its model \[30\]"):
        load(tmp_path / "b", "gine", of, hidden_dim=16, node_types=[30])
    with pytest.raises(UsageError, match="models of smiles that predict of each node"):
        load(tmp_path / "c", "gine", replace(of, level="node"), hidden_dim=16, readout="node")
    with pytest.raises(DataError, match="no preprocessing of graphs"):
        path = tmp_path / "d"
        model = create_model("gine", outputs=1, node_types=[28])
        hub.save(
            path, model, domain="graph", name="gine", arguments={"outputs": 1, "node_types": [28]},
            preprocessing={"input": "smiles"},
        )  # fmt: skip
        hub.load(path)


def test_cuts():
    assert list(cuts([], 5)) == []
    assert list(cuts([9], 5)) == [(0, 1)]
    assert list(cuts([2, 2, 2, 9, 1, 5], 5)) == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
