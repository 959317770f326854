"""`manyheads graph explain`: tables and pictures of molecules, graphs, nodes and pairs; bad rows aside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image

import manyheads
from manyheads.apps import cli, options
from manyheads.apps.explain_graph import read_options
from manyheads.core import hub
from manyheads.core.errors import UsageError
from manyheads.graph.columns import Column
from manyheads.graph.link_parts import EDGE
from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C(C", "CCO", "Cn1cnc2c1c(=O)n(C)c(=O)n2C"]
IDS = ["aspirin", "bad", "ethanol", "caffeine"]
TOPIC = Target("classification", ("topic",), ("art", "law"))
SOLUBILITY = Target("regression", ("logS",), None, (-3.0,), (2.0,))
FEATURES = (Column("f", size=3), Column("kind", ("x", "y")))
SMALL = {"hidden_dim": 16, "L": 2}
MODELS: dict[str, tuple[str, Preprocessing, dict[str, Any]]] = {
    "transformer": (
        "graph_transformer",
        Preprocessing(encoding=Encoding("laplacian", 3), target=SOLUBILITY),
        {**SMALL, "n_heads": 4},
    ),
    "gine": ("gine", Preprocessing(target=Target("multilabel", ("toxic", "bitter"))), SMALL),
    "node": (
        "graph_transformer",
        Preprocessing("tables", node_columns=FEATURES, level="node", target=TOPIC),
        {**SMALL, "n_heads": 2, "edges": False, "readout": "node"},
    ),
    "sampled": (
        "gine",
        Preprocessing("tables", node_columns=FEATURES, level="node", target=TOPIC, fanouts=(4, 3)),
        {**SMALL, "readout": "node"},
    ),
    "pair": (
        "gine",
        Preprocessing("tables", node_columns=FEATURES, level="pair", target=EDGE),
        {**SMALL, "readout": "pair"},
    ),
    "graph": (
        "gps",
        Preprocessing("tables", node_columns=FEATURES, target=Target("regression", ("y",))),
        {**SMALL, "n_heads": 2},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model folders."""
    folder = tmp_path_factory.mktemp("models")
    for where, (name, of, sizes) in MODELS.items():
        torch.manual_seed(0)
        arguments = {**sizes, **{key: v for key, v in of.model_inputs().items() if key != "max_distance"}}
        model = manyheads.create_model(name, **arguments)
        hub.save(
            folder / where, model, domain="graph", name=name, arguments=arguments, preprocessing=of.to_json()
        )
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of SMILES, and a graph."""
    folder = tmp_path_factory.mktemp("inputs")
    pd.DataFrame({"name": IDS, "smiles": SMILES}).to_csv(folder / "molecules.csv", index=False)
    rng = np.random.default_rng(0)
    (folder / "net").mkdir()
    names = [f"paper {i}" for i in range(60)]
    nodes = pd.DataFrame(rng.normal(size=(60, 3)), columns=["f_0", "f_1", "f_2"])
    nodes.insert(0, "id", names)
    nodes["kind"] = rng.choice(["x", "y"], 60)
    nodes.to_csv(folder / "net" / "nodes.csv", index=False)
    ends = np.stack([np.arange(1, 60), rng.integers(0, np.arange(1, 60))])  # a tree: node 0 has most
    edges = pd.DataFrame({"source": [names[i] for i in ends[0]], "target": [names[i] for i in ends[1]]})
    edges.to_csv(folder / "net" / "edges.csv", index=False)
    edges.iloc[[4, 9]].to_csv(folder / "net" / "pairs.csv", index=False)
    return folder


def call(*args: object) -> int:
    return cli.main(["graph", "explain", *map(str, args)])


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}


def check_sums(rows: pd.DataFrame, found: dict[str, pd.DataFrame]) -> None:
    """The table's attributions sum to the difference of the predictions, as far as the row says."""
    assert rows.complete.all()
    for row in rows.itertuples():
        total = sum(
            t[t.id == row.id].attribution.sum() for name, t in found.items() if name in ("nodes", "edges")
        )
        assert abs(total - (row.prediction - row.baseline)) <= row.error + 1e-4


def test_molecules(models: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "why"
    file = inputs / "molecules.csv"
    assert call(models / "transformer", file, "-o", out, "--id-column", "name", "--json") == 3
    shown = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in shown["rows"]] == ["aspirin", "ethanol", "caffeine"]
    assert [each["id"] for each in shown["bad"]] == ["bad"]
    assert "not a SMILES" in shown["bad"][0]["reason"]
    rows, found = pd.read_csv(out / "rows.csv"), tables(out)
    assert found.keys() == {"nodes", "edges", "attention"}
    check_sums(rows, found)
    assert set(rows.start) == {"mean"}
    predicted = manyheads.load(str(models / "transformer")).predict(
        pd.DataFrame({"smiles": [SMILES[0], *SMILES[2:]]})
    )
    np.testing.assert_allclose(rows.prediction, predicted.logS, atol=1e-4)
    nodes = found["nodes"]
    assert "".join(nodes[nodes.id == "ethanol"].atom) == "CCO"
    attention = found["attention"]
    assert list(attention.columns) == ["id", "source", "target", "weight"]
    np.testing.assert_allclose(attention.groupby(["id", "target"]).weight.sum(), 1, atol=1e-3)
    for row in shown["rows"]:
        pixels = image.imread(row["picture"])[..., :3]
        assert pixels.std() > 0.05
        assert (pixels.max(-1) - pixels.min(-1) > 0.2).mean() > 0.005  # there is colour


def test_a_target_a_baseline_and_the_tables_alone(
    models: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [models / "gine", inputs / "molecules.csv", "--id-column", "name", "--row", "ethanol", "caffeine"]
    assert call(*args, "-o", tmp_path / "a", "--target", "bitter", "--no-pictures") == 0
    assert call(*args, "-o", tmp_path / "b", "--target", "bitter", "--baseline", "zero", "--no-pictures") == 0
    assert call(*args, "-o", tmp_path / "c") == 2
    assert "2 targets: name one by --target (toxic, bitter)" in capsys.readouterr().err
    a, b = (pd.read_csv(tmp_path / each / "rows.csv") for each in "ab")
    assert a.id.tolist() == ["ethanol", "caffeine"]
    assert set(a.target) == {"bitter"}
    assert a.prediction.tolist() == b.prediction.tolist()
    assert (a.start + b.start == "meanzero").all()
    assert (a.baseline - b.baseline).abs().min() > 1e-4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "edges.parquet",
        "nodes.parquet",
        "rows.csv",
    ]


@pytest.mark.parametrize("model", ["node", "sampled"])
def test_nodes(models: Path, inputs: Path, tmp_path: Path, model: str) -> None:
    ids = ["paper 7", "paper 0"]
    assert call(models / model, inputs / "net", "-o", tmp_path / "why", "--row", *ids) == 0
    rows, found = pd.read_csv(tmp_path / "why" / "rows.csv"), tables(tmp_path / "why")
    assert sorted(rows.id) == sorted(ids)
    check_sums(rows, found)
    assert set(rows.start) == {"zero"}
    answer = manyheads.load(str(models / model)).predict(inputs / "net").set_index("id")
    for row in rows.itertuples():
        assert row.target == answer.label[row.id]
        assert 1 / (1 + np.exp(-row.prediction)) == pytest.approx(answer.probability[row.id], abs=1e-4)
    features = found["features"]
    assert set(features.feature) <= {"f_0", "f_1", "f_2", "kind=x", "kind=y", "kind=other"}
    nodes = found["nodes"]
    assert set(ids) <= set(nodes.node)
    assert (len(nodes) == 120) == (model == "node")
    if model == "node":
        attention = found["attention"]
        assert len(attention) == 2 * 59  # of the one graph, once
        assert set(attention.id) == {""}
        assert set(attention.source) == {f"paper {i}" for i in range(60)}
    assert len(list((tmp_path / "why" / "pictures").glob("*.png"))) == 2


def test_pairs_and_graphs(models: Path, inputs: Path, tmp_path: Path) -> None:
    assert call(models / "pair", inputs / "net", "-o", tmp_path / "pair") == 0
    rows = pd.read_csv(tmp_path / "pair" / "rows.csv")
    check_sums(rows, tables(tmp_path / "pair"))
    answer = manyheads.load(str(models / "pair")).predict(inputs / "net")
    assert rows.id.tolist() == answer.id.tolist()
    np.testing.assert_allclose(1 / (1 + np.exp(-rows.prediction)), answer.edge, atol=1e-4)
    args = ["--weights", "each", "--method", "attention"]
    assert call(models / "graph", inputs / "net", "-o", tmp_path / "graph", *args) == 0
    found = tables(tmp_path / "graph")
    assert found.keys() == {"attention"}
    assert len(found["attention"]) == 60 * 60 * 2 * 2  # all pairs, layers, heads
    assert (tmp_path / "graph" / "pictures" / "net.png").is_file()


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nothing", (), "no model folder"),
        ("node", ("--target", "lwa"), "the model has no class 'lwa'; did you mean 'law'?"),
        ("node", ("--row", "paper 99"), "the input has no row 'paper 99'"),
        ("sampled", ("--method", "attention"), "gine passes messages: it has no attention to show"),
    ],
)
def test_what_there_is_not_is_said(
    models: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str,
    more: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    assert call(models / model, inputs / "net", "-o", tmp_path / "why", "--most", 1, *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--most", "0"], "--most must be at least 1"),
        (["--method", "attention", "--target", "y"], "--target and --baseline are for attributions"),
        (["--baselin", "zero"], "did you mean '--baseline'"),
        (["--weights", "all"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(more: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_options(["model", "a.csv", "-o", "why", *more])


def test_help_is_answered_without_torch() -> None:
    code = (
        "import sys\nfrom manyheads.apps import cli\n"
        "try:\n    cli.main(['graph', 'explain', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "attention.parquet" in done.stdout


def test_two_domains_have_a_tool_of_one_name() -> None:
    assert options.TOOLS["vision"]["explain"][0] != options.TOOLS["graph"]["explain"][0]
    assert "explain" in options.overview("graph")
