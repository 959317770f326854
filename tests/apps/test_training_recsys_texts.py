"""Recommenders of texts through the command line: MovieLens, a log and a table of one's own, resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads
from manyheads.apps import cli, options, training
from manyheads.apps.curves import read_log
from manyheads.core import hub

needs_data = pytest.mark.skipif("MANYHEADS_DATA" not in os.environ, reason="MANYHEADS_DATA names no folder")
SMALL = """\
trainer: {max_epochs: 3, check_val_every_n_epoch: 1}
model:
  arguments: {hidden_size: 16, layers: 1, inner_size: 16}
  stages: {pretrain: 1, refresh: 1}
  optimizer: {warmup_steps: 5}
data:
  texts: {vocab_size: 1000}
  drawing: {length: 3, per_user: 1}
"""
OWN = """\
task: text_recommendation
trainer: {max_epochs: 4, gradient_clip_val: 1.0}
model:
  ks: [1, 5]
  arguments: {hidden_size: 16, layers: 1, heads: 2, inner_size: 32}
  stages: {pretrain: 1, refresh: 2}
  optimizer: {schedule: constant, warmup_steps: 2, learning_rate: 5.0e-3}
data:
  columns: {user: who, item: what, timestamp: when}
  core: {users: 3, items: 1}
  texts: {item: sku, attributes: [title, kind], missing: leave_out, vocab_size: 300, max_tokens: 60}
  drawing: {length: 4, per_user: 2}
  loading: {batch_size: 32}
"""


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are slower on several; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))])


@needs_data
def test_fit_validate_test_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, small = tmp_path / "run", tmp_path / "small.yaml"
    small.write_text(SMALL)
    arguments = ("--config", "recformer_ml_100k", "--config", small, "--output", run)
    assert call("recsys", "fit", *arguments) == 0
    assert capsys.readouterr().out.count("val_ndcg@10") == 3 + 1
    log = read_log(run / "logs")
    folder = hub.read_config(run / "model")
    assert folder.arguments["num_items"] == 1282  # one of twenty of 1,349 is never trained on
    assert folder.training["best_val_ndcg@10"] == pytest.approx(log["val_ndcg@10"].max())
    assert call("recsys", "validate", *arguments) == 0
    validated = json.loads((run / "validate.json").read_text())
    assert validated["val_ndcg@10"] == pytest.approx(log["val_ndcg@10"].max())
    capsys.readouterr()
    assert call("recsys", "test", *arguments) == 0
    assert "items that training never saw: 67, in" in capsys.readouterr().out
    tested = json.loads((run / "test.json").read_text())
    assert {"test_ndcg@10", "test_cold_hr@10", "test_cold_only_chance_ndcg@20"} <= tested.keys()
    assert len(pd.read_csv(run / "ranks.csv")) == 943
    cold = pd.read_csv(run / "cold_ranks.csv")
    assert cold["item_id"].nunique() == 67
    assert call("recsys", "predict", *arguments) == 0
    rows = parts(run / "predictions")
    assert rows.groupby("user_id").size().eq(10).all() and rows["user_id"].nunique() == 943
    assert not set(rows["item_id"]) & set(cold["item_id"].astype(str))


def write(folder: Path) -> tuple[Path, Path]:
    """A log, and a table that has no text of one of its items, and three that the log has not."""
    rng = np.random.default_rng(0)
    size = 2500
    frame = pd.DataFrame(
        {
            "who": rng.integers(0, 120, size).astype(str),
            "what": (40 * rng.random(size) ** 2).astype(int).astype(str),
            "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 10**7, size), unit="s"),
        }
    )
    frame.to_csv(folder / "log.csv", index=False)
    items = [
        {"sku": n, "kind": f"kind {n % 4}", "title": f"thing {n}", "unused": n} for n in range(43) if n != 7
    ]
    pd.DataFrame(items).to_parquet(folder / "items.parquet")
    return folder / "log.csv", folder / "items.parquet"


def test_a_log_and_a_table_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (log, items), config, run = write(tmp_path), tmp_path / "own.yaml", tmp_path / "run"
    config.write_text(OWN)
    arguments = ("--config", config, "--data.dataset", log, "--data.items", items, "--output", run)
    assert call("recsys", "fit", *arguments) == 0
    assert hub.read_config(run / "model").arguments["num_items"] == 39
    job = ("predict", run / "model", log, "--quiet", "--shard-size", 50, "--top-k", 50)
    assert call(*job, "-o", tmp_path / "known") == 0
    assert call(*job, "-o", tmp_path / "new", "--items", items) == 0
    known, new = parts(tmp_path / "known"), parts(tmp_path / "new")
    assert set(new["item_id"]) - set(known["item_id"]) == {"40", "41", "42"}
    wanted = manyheads.load(run / "model").predict(log, items=str(items), top_k=50)
    pd.testing.assert_frame_equal(
        new.reset_index(drop=True).drop(columns="score"), wanted.drop(columns="score"), check_dtype=False
    )
    # Another table of items is another job.
    part = sorted((tmp_path / "new").glob("part-*"))[1]
    before = part.read_bytes()
    part.unlink()
    (tmp_path / "new" / "_SUCCESS").unlink()
    assert call(*job, "-o", tmp_path / "new", "--items", items, "--resume") == 0
    assert part.read_bytes() == before
    pd.read_parquet(items).assign(title="other").to_parquet(items)
    assert call(*job, "-o", tmp_path / "new", "--items", items, "--resume") == 2


def test_a_stopped_fit_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Stopped in each stage: the words that are hidden, the table and the best weights are the same."""
    config = tmp_path / "own.yaml"
    config.write_text(OWN)
    log, items = write(tmp_path)
    arguments = ("--config", config, "--data.dataset", log, "--data.items", items, "--patience", 9)
    fit = ("recsys", "fit", *arguments, "--trainer.max_epochs")
    assert call(*fit, 5, "--output", tmp_path / "whole") == 0
    resumed = ("--ckpt_path", tmp_path / "cut" / "last.ckpt", "--output", tmp_path / "cut")
    assert call(*fit, 1, "--output", tmp_path / "cut") == 0
    for epochs in (2, 3, 4, 5):
        assert call(*fit, epochs, *resumed) == 0
    whole, cut = (read_log(tmp_path / name / "logs") for name in ("whole", "cut"))
    assert len(whole) == 5
    for name in ("train_loss", "val_ndcg@5", "val_mrr@5"):
        assert cut[name].tolist() == whole[name].tolist()


@pytest.mark.parametrize("task", ["recommendation", "text_recommendation"])
def test_the_shipped_help_is_the_parsers(task: str) -> None:
    shipped = (options.CONFIGS / "recsys" / "help" / f"{task}.txt").read_text()
    made = training.write_help("recsys", options.find_task("recsys", task))
    assert made == shipped, "run: python -m manyheads.apps.training"
