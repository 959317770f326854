"""Training graph models through the command line: a table of molecules, one graph's nodes, resuming."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.apps import cli, options, training
from manyheads.apps.curves import read_log
from manyheads.core import hub

SCRIPT = Path(sys.executable).parent / "manyheads"
DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
MEASURED = "measured log solubility in mols per litre"
SMALL = """\
trainer: {{max_epochs: 3, accumulate_grad_batches: 2}}
model:
  name: graph_transformer
  arguments: {{hidden_dim: 16, L: 2, n_heads: 2, dropout: 0.1}}
  optimizer: {{warmup_steps: 2, ema_decay: 0.9}}
data:
  dataset: {table}
  split: {{kind: random}}
  targets: {{names: ["{target}"]}}
  encoding: {{kind: laplacian, k: 4}}
  loading: {{batch_size: 8, max_nodes: 400, buckets: 3}}
"""


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are slower on several; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The shipped config of ESOL with a smaller model, and a table of its first 120 molecules."""
    table = tmp_path / "molecules.csv"
    pd.read_csv(Path(str(DATA)) / "graph" / "esol_delaney.csv.gz", nrows=120).to_csv(table, index=False)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(table=table, target=MEASURED))
    return ["--config", "esol", "--config", str(path)]


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


@needs_data
def test_fit_validate_test_and_predict(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("graph", "fit", *small, "--output", run) == 0
    assert capsys.readouterr().out.count("val_rmse") == 3 + 1  # a line an epoch, and the best
    assert (run / "curves.png").stat().st_size > 5000
    log = read_log(run / "logs")
    assert {"train_loss", "val_mae", "val_r2"} <= set(log.columns)
    folder = hub.read_config(run / "model")
    assert folder.training["best_val_rmse"] == pytest.approx(log["val_rmse"].min())
    assert folder.preprocessing["encoding"] == {"kind": "laplacian", "k": 4}
    best = torch.load(run / "best.ckpt", weights_only=True)
    name = "model.embedding_h.weight"
    assert not best["state_dict"][name].equal(best["current_model_state"][name])  # averaged
    assert call("graph", "validate", *small, "--output", run) == 0
    found = json.loads((run / "validate.json").read_text())
    assert found["val_rmse"] == pytest.approx(log["val_rmse"].min())
    capsys.readouterr()
    assert call("graph", "test", *small, "--output", run) == 0
    assert MEASURED in capsys.readouterr().out
    tested = json.loads((run / "test.json").read_text())
    rows = pd.read_csv(run / "rows.csv", dtype={"id": str}).set_index("id")
    assert tested["test_rows"] == len(rows) == 12
    assert tested["test_mae"] == pytest.approx((rows[f"{MEASURED}_predicted"] - rows[MEASURED]).abs().mean())
    assert (run / "picture.png").stat().st_size > 5000

    # the model folder predicts what the test found, in the data's units
    predicted = manyheads.load(run / "model").predict(tmp_path / "molecules.csv").set_index("id")
    assert len(predicted) == 120
    for key, value in rows[f"{MEASURED}_predicted"].items():
        assert predicted.loc[str(key), MEASURED] == pytest.approx(value, abs=1e-4)
    assert call("graph", "predict", *small, "--output", run) == 0
    parts = pd.concat([pd.read_parquet(part) for part in (run / "predictions").glob("part-*.parquet")])
    assert len(parts) == 120


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


@needs_data
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_or_killed_run_goes_on_to_the_same_weights(
    small: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    args = ["graph", "fit", *small, "--trainer.max_epochs", "6"]
    assert call(*args, "--output", straight) == 0
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), *args, "--output", str(stopped)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch  2/"):
                break
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum), errors
    state = torch.load(stopped / "last.ckpt", weights_only=True)
    assert state["epoch"] < 5  # counted from 0: epochs were left to do
    assert call(*args, "--output", stopped, "--ckpt_path", stopped / "last.ckpt") == 0
    for name in ("last.ckpt", "best.ckpt"):
        there, here = (torch.load(run / name, weights_only=True) for run in (straight, stopped))
        assert same(there["state_dict"], here["state_dict"])
        assert same(there["current_model_state"], here["current_model_state"])
    logs = [read_log(run / "logs").filter(like="val_") for run in (straight, stopped)]
    assert len(logs[0]) == 6
    pd.testing.assert_frame_equal(*logs)


@needs_data
def test_the_nodes_of_one_graph_by_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    args = ["--config", "gcn_cora", "--output", run, "--trainer.max_epochs", 12]
    args += ["--data.loading.fanouts", "[10, 10]", "--data.loading.batch_size", 70]
    assert call("graph", "fit", *args) == 0
    assert call("graph", "test", *args) == 0
    assert "recall" in capsys.readouterr().out
    tested = json.loads((run / "test.json").read_text())
    assert tested["test_rows"] == 1000
    assert tested["test_accuracy"] > 0.3  # of seven classes
    folder = hub.read_config(run / "model")
    assert folder.preprocessing["target"]["classes"] == [str(i) for i in range(7)]  # type: ignore[index, call-overload]
    assert folder.preprocessing["fanouts"] == [10, 10]
    assert folder.preprocessing["row_normalise"] is True


@needs_data
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model: {arguments: {outputs: 3}}", "model.arguments.outputs is decided by the data"),
        ("model: {arguments: {readout: node}}", "mean, sum or max"),
        ("model: {plateau: {patience: 3}}", "optimizer.schedule: constant"),
        ("model: {optimizer: {learning_rat: 1}}", "learning_rat"),
        ("model: {loss: {regression: l3}}", "l3"),
        ("model: {name: kipf_gcn, arguments: null}", "data.encoding.kind: none"),
        ("model: {name: graph_transformer_pattern, arguments: null}", "is made for node_types [3]"),
        ("data: {loading: {max_nodes: 3}}", "raise loading.max_nodes"),
        ("data: {targets: {names: [solubility]}}", "solubility"),
        ("data: {dataset: nowhere.csv}", "nowhere.csv"),
        ("data: {encoding: {kind: laplacian, k: 0}}", "laplacian"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    small: list[str], tmp_path: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(change)
    assert call("graph", "fit", *small, "--config", other, "--output", tmp_path / "run") in (1, 2)
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2


def test_the_shipped_help_is_the_parsers() -> None:
    shipped = (options.CONFIGS / "graph" / "help" / "graph.txt").read_text()
    made = training.write_help("graph", options.find_task("graph", "graph"))
    assert made == shipped, "run: python -m manyheads.apps.training"


@pytest.mark.parametrize("name", options.configs("graph"))
def test_shipped_configs_begin_with_their_command_and_result(name: str) -> None:
    head = options.resolve_config("graph", name).read_text().splitlines()[:4]
    assert head[:2] == [f"# manyheads graph {action} --config {name}" for action in ("fit", "test")]
    assert head[2].startswith("# Result: ")
    assert "pending" not in head[2]
