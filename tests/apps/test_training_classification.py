"""Texts and variables through the command line: fit, test, predict; killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.apps import cli
from manyheads.apps.curves import read_log

OWN = """\
task: text_classification
trainer: {max_epochs: 3}
model:
  arguments: {hidden_size: 32, layers: 1, heads: 2, inner_size: 64, window: 8, fusion_layers: 1, dropout: 0.0}
  optimizer: {learning_rate: 5.0e-3, schedule: constant, warmup_steps: 5}
  class_weights: balanced
data:
  fields: {texts: [review], numbers: [age], categories: [town], label: mood, id: key}
  limits: {vocab_size: 300, max_tokens: 40}
  loading: {batch_size: 16}
"""


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are slower on several; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))])


def write_table(path: Path, rows: int = 600) -> Path:
    """Moods that follow from the word where the customer is of one town, and from the age elsewhere."""
    rng = np.random.default_rng(0)
    good, old, town = rng.random(rows) < 0.5, rng.integers(18, 80, rows), rng.choice(["Oslo", "Bergen"], rows)
    glad = np.where(town == "Oslo", good, old > 48)
    frame = pd.DataFrame(
        {
            "key": [f"k{row}" for row in range(rows)],
            "review": np.where(good, "a good day", "a bad day"),
            "age": old.astype(object),
            "town": town,
            "mood": np.where(glad, "glad", "sad"),
        }
    )
    frame.loc[::50, "town"] = None
    frame.to_csv(path, index=False)
    return path


def test_fit_test_and_predict(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, run = write_table(tmp_path / "table.csv"), tmp_path / "run"
    options = ("--config", config, "--data.dataset", table, "--output", run, "--trainer.max_epochs", 8)
    assert call("recsys", "fit", *options) == 0
    log = read_log(run / "logs")
    assert {"train_loss", "val_loss", "val_accuracy", "val_macro_f1", "val_roc_auc"} <= set(log.columns)
    assert call("recsys", "test", *options) == 0
    tested = json.loads((run / "test.json").read_text())
    assert tested["test_roc_auc"] > 0.9 and tested["test_macro_f1"] > 0.75
    assert tested["test_majority_accuracy"] < 0.65 and tested["test_rows"] == 60
    report = pd.read_csv(run / "report.csv")
    assert report["label"].tolist() == ["glad", "sad"] and report["support"].sum() == 60
    assert pd.read_csv(run / "confusion.csv", index_col=0).to_numpy().sum() == 60
    assert "majority" in capsys.readouterr().out
    assert call("predict", run / "model", table, "-o", tmp_path / "out", "--top-k", 1, "--quiet") == 0
    rows = parts(tmp_path / "out")
    assert list(rows.columns) == ["id", "label", "probability"]
    assert rows["id"].tolist() == [f"k{row}" for row in range(600)]
    known = pd.read_csv(table)
    assert (rows["label"].to_numpy() == known["mood"].to_numpy()).mean() > 0.8
    known["age"] = known["age"].astype(object)
    known.loc[3, "age"] = "old"
    known.to_csv(table, index=False)
    assert call("predict", run / "model", table, "-o", tmp_path / "bad", "--quiet") == 3
    assert json.loads((tmp_path / "bad" / "bad-00000.jsonl").read_text())["id"] == "k3"


def test_a_stopped_fit_goes_on_as_if_it_had_not_been(config: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.csv", 200)
    options = ("--config", config, "--data.dataset", table, "--patience", 9)
    assert call("recsys", "fit", *options, "--output", tmp_path / "whole") == 0
    assert call("recsys", "fit", *options, "--trainer.max_epochs", 1, "--output", tmp_path / "cut") == 0
    resumed = ("--ckpt_path", tmp_path / "cut" / "last.ckpt", "--output", tmp_path / "cut")
    assert call("recsys", "fit", *options, *resumed) == 0
    whole, cut = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_killed_job_goes_on_to_the_same_bytes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, run = write_table(tmp_path / "table.csv"), tmp_path / "run"
    options = ("--config", config, "--data.dataset", table, "--output", run, "--trainer.max_epochs", 1)
    assert call("recsys", "fit", *options) == 0
    job = ["predict", run / "model", table, "--quiet", "--shard-size", 10, "-o"]
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    command = [sys.executable, "-m", "manyheads.apps.cli", *map(str, job)]
    # in a process of its own, like the other: this one's threads may be others
    subprocess.run([*command, str(tmp_path / "whole")], env=os.environ, check=True, capture_output=True)
    killed = subprocess.Popen([*command, str(tmp_path / "cut")], env=os.environ, stderr=subprocess.PIPE)
    while len(list((tmp_path / "cut").glob("part-*"))) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "_SUCCESS").exists()
    assert call(*job, tmp_path / "cut", "--resume") == 0
    found, wanted = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("cut", "whole")
    )
    assert found == wanted
