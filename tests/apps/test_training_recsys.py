"""Recommenders through the command line: MovieLens, a log of one's own, lists for all its users, resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads
from manyheads.apps import cli
from manyheads.apps.curves import read_log
from manyheads.core import hub

# Until every task of its catalogue stands, the domain is not listed, and the command line does not know it.
needs_data = pytest.mark.skipif("MANYHEADS_DATA" not in os.environ, reason="MANYHEADS_DATA names no folder")
SMALL = """\
trainer: {max_epochs: 2, check_val_every_n_epoch: 1}
model:
  arguments: {hidden_size: 16, layers: 1}
  optimizer: {warmup_steps: 5}
data:
  windows: {length: 20, step: 0}
"""
OWN = """\
task: recommendation
trainer: {max_epochs: 2}
model:
  name: sasrec
  ks: [1, 5]
  arguments: {hidden_size: 16, layers: 1, hidden_dropout: 0.0, attn_dropout: 0.0}
  optimizer: {schedule: constant, warmup_steps: 2}
data:
  columns: {user: who, item: what, timestamp: when, rating: stars}
  rules: {bad: skip, min_rating: 3}
  core: {users: 3, items: 1}
  splitting: {kind: time, val: 0.15, test: 0.15}
  windows: {length: 8}
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
@pytest.mark.parametrize("config", ["bert4rec_ml_100k", "sasrec_ml_100k"])
def test_fit_validate_test_and_predict(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, small = tmp_path / "run", tmp_path / "small.yaml"
    small.write_text(SMALL)
    options = ("--config", config, "--config", small, "--output", run)
    assert call("recsys", "fit", *options) == 0
    assert capsys.readouterr().out.count("val_ndcg@10") == 2 + 1  # a line an epoch, and the best
    log = read_log(run / "logs")
    wanted = {"train_loss", "val_ndcg@10", "val_hr@10", "val_mrr@10", "val_popularity_ndcg@10"}
    assert wanted <= set(log.columns)
    folder = hub.read_config(run / "model")
    assert folder.training["best_val_ndcg@10"] == pytest.approx(log["val_ndcg@10"].max())
    assert folder.arguments["num_items"] == 1349
    assert call("recsys", "validate", *options) == 0
    assert json.loads((run / "validate.json").read_text())["val_ndcg@10"] == pytest.approx(
        log["val_ndcg@10"].max()
    )
    assert call("recsys", "test", *options) == 0
    tested = json.loads((run / "test.json").read_text())
    assert round(tested["test_popularity_hr@10"], 4) == 0.0838
    assert round(tested["test_popularity_ndcg@10"], 4) == 0.0436
    assert {"test_mrr", "test_coverage@10", "test_novelty@20", "test_stratified_hr@5"} <= tested.keys()
    assert len(pd.read_csv(run / "ranks.csv")) == 943
    assert (run / "ranks.png").stat().st_size > 5000
    assert call("recsys", "predict", *options) == 0
    rows = parts(run / "predictions")
    assert rows.groupby("user_id").size().eq(10).all() and rows["user_id"].nunique() == 943
    seen = pd.read_parquet(next((tmp_path / "cache").rglob("ml_100k.parquet"))).astype(str)
    assert not set(zip(rows["user_id"], rows["item_id"], strict=True)) & set(
        zip(seen["user_id"], seen["item_id"], strict=True)
    )


def write_log(path: Path) -> Path:
    """A log as they come: rated, out of order, with gaps, repeated."""
    rng = np.random.default_rng(0)
    size = 3000
    frame = pd.DataFrame(
        {
            "who": rng.integers(0, 150, size).astype(str),
            "what": (40 * rng.random(size) ** 2).astype(int).astype(str),
            "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 10**7, size), unit="s"),
            "stars": rng.integers(1, 6, size),
        }
    )
    frame = pd.concat([frame, frame[:50]])
    frame.loc[frame.sample(30, random_state=0).index, "what"] = None
    frame.to_csv(path, index=False)
    return path


def test_a_log_of_ones_own_becomes_lists_for_all_its_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, config, run = write_log(tmp_path / "log.csv"), tmp_path / "own.yaml", tmp_path / "run"
    config.write_text(OWN)
    options = ("--config", config, "--data.dataset", log, "--output", run)
    assert call("recsys", "fit", *options) == 0
    assert "val_ndcg@5" in capsys.readouterr().out
    deny = tmp_path / "deny.txt"
    deny.write_text("0\n1\n")
    job = (
        "predict",
        run / "model",
        log,
        "-o",
        tmp_path / "job",
        "--quiet",
        "--shard-size",
        40,
        "--deny",
        deny,
    )
    assert call(*job, "--top-k", 3) == 1  # rows without an item
    assert "'what' is missing" in capsys.readouterr().err
    job = (*job[:4], tmp_path / "again", *job[5:])
    assert call(*job, "--top-k", 3, "--bad-rows", "skip") == 0
    rows = parts(tmp_path / "again")
    wanted = manyheads.load(run / "model").predict(log, top_k=3, bad_rows="skip", deny=str(deny))
    pd.testing.assert_frame_equal(
        rows.reset_index(drop=True).drop(columns="score"), wanted.drop(columns="score"), check_dtype=False
    )
    assert len(list((tmp_path / "again").glob("part-*"))) == 4
    assert not set(rows["item_id"]) & {"0", "1"}
    # A part that was lost is made again, with the same bytes; another list of items is another job.
    part = sorted((tmp_path / "again").glob("part-*"))[1]
    before = part.read_bytes()
    part.unlink()
    (tmp_path / "again" / "_SUCCESS").unlink()
    assert call(*job, "--top-k", 3, "--bad-rows", "skip", "--resume") == 0
    assert part.read_bytes() == before
    deny.write_text("0\n2\n")
    assert call(*job, "--top-k", 3, "--bad-rows", "skip", "--resume") == 2
    assert call("predict", run / "model", log, "-o", tmp_path / "none", "--unknown", "popularr") == 2


def test_a_stopped_fit_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(OWN)
    log = write_log(tmp_path / "log.csv")
    options = ("--config", config, "--data.dataset", log, "--patience", 9)
    assert call("recsys", "fit", *options, "--trainer.max_epochs", 3, "--output", tmp_path / "whole") == 0
    assert call("recsys", "fit", *options, "--trainer.max_epochs", 1, "--output", tmp_path / "cut") == 0
    resumed = ("--ckpt_path", tmp_path / "cut" / "last.ckpt", "--output", tmp_path / "cut")
    assert call("recsys", "fit", *options, "--trainer.max_epochs", 3, *resumed) == 0
    whole, cut = (read_log(tmp_path / name / "logs") for name in ("whole", "cut"))
    assert len(whole) == 3
    for name in ("train_loss", "val_ndcg@5", "val_mrr@5"):
        assert cut[name].tolist() == whole[name].tolist()
