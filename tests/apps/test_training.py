"""Training through the command line: run folders, resuming, and errors in a line or two."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.apps import cli, options, training
from manyheads.core.catalog import tasks
from manyheads.core.errors import UsageError

SCRIPT = Path(sys.executable).parent / "manyheads"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny model on 600 hours of three variates: 24 hours to the next 12."""
    hours = pd.date_range("2024-01-01", periods=600, freq="h", name="date")
    phase = np.arange(600)[:, None] * 2 * np.pi / 24 + np.array([0.0, 1.0, 2.0])
    noise = np.random.default_rng(0).normal(size=(600, 3))
    table = pd.DataFrame(np.sin(phase) + 0.3 * noise, columns=["a", "b", "c"], index=hours)
    table.to_csv(tmp_path / "hours.csv")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""seed_everything: 3
model:
  name: itransformer
  arguments: {{d_model: 16, d_ff: 16, n_heads: 2, e_layers: 1}}
  learning_rate: 1.0e-3
data:
  dataset: {tmp_path / "hours.csv"}
  seq_len: 24
  pred_len: 12
  batch_size: 8
trainer:
  max_epochs: 2
"""
    )
    return path


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fit_then_validate_test_and_predict(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("timeseries", "fit", "--config", config, "--output", run) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "epoch  2/2" in printed
    for name in ("best.ckpt", "last.ckpt", "config.yaml", "model/config.json", "model/model.safetensors"):
        assert (run / name).is_file(), name
    assert "train_loss" in next(run.glob("logs/*/metrics.csv")).read_text()
    for action in ("validate", "test"):
        assert call("timeseries", action, "--config", config, "--output", run) == 0
    figures = json.loads((run / "test.json").read_text())
    assert figures["test_windows"] == 600 - 420 - 60 - 12 + 1  # the last 120 rows, looking back over 24 more
    assert 0 < figures["test_mse"] < 1.5
    assert call("timeseries", "predict", "--config", config, "--output", run) == 0
    rows = pd.concat([pd.read_parquet(part) for part in (run / "forecasts").glob("part-*.parquet")])
    assert len(rows) == 3 * 12
    assert rows["ds"].min() == pd.Timestamp("2024-01-26")


def test_a_saved_config_repeats_the_run(config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("timeseries", "fit", "--config", config, "--output", first) == 0
    assert call("timeseries", "fit", "--config", first / "config.yaml", "--output", second) == 0
    assert sha256(first / "model/model.safetensors") == sha256(second / "model/model.safetensors")


def test_a_long_file_with_gaps_is_refused_or_masked_as_asked(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = pd.read_csv(tmp_path / "hours.csv")
    long = wide.melt("date", var_name="unique_id", value_name="y").rename(columns={"date": "ds"})
    long.loc[[100, 101, 700, 1500], "y"] = np.nan
    long.to_parquet(tmp_path / "long.parquet")
    run = tmp_path / "run"
    args = (
        "timeseries",
        "fit",
        "--config",
        config,
        "--output",
        run,
        "--data.dataset",
        tmp_path / "long.parquet",
    )
    assert call(*args) == 1
    assert "missing value" in (error := capsys.readouterr().err)
    assert "row" in error
    assert call(*args, "--data.missing", "mask") == 0
    assert call("predict", run / "model", tmp_path / "long.parquet", "-o", tmp_path / "out", "--quiet") == 0
    rows = pd.concat([pd.read_parquet(part) for part in (tmp_path / "out").glob("part-*.parquet")])
    assert sorted(rows["unique_id"].unique()) == ["a", "b", "c"]
    assert rows["yhat"].notna().all()
    assert rows["yhat"].abs().max() < 3


def test_a_second_fit_needs_a_word(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    args = ("timeseries", "fit", "--config", config, "--output", run, "--trainer.max_epochs", 1)
    assert call(*args) == 0
    kept = sha256(run / "last.ckpt")
    assert call(*args) == 2
    assert "--ckpt_path" in capsys.readouterr().err
    assert sha256(run / "last.ckpt") == kept
    assert call(*args, "--overwrite", "true", "--seed_everything", 4) == 0
    assert sha256(run / "last.ckpt") != kept


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_goes_on_to_the_same_weights(
    config: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    args = ["timeseries", "fit", "--config", str(config), "--trainer.max_epochs", "12", "--patience", "99"]
    assert call(*args, "--output", straight) == 0
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
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
    if signum == signal.SIGTERM:  # the state of the batch; a killed run has that of its last epoch's end
        assert process.returncode == 143, errors
        assert f"--ckpt_path {stopped / 'last.ckpt'}" in errors
        assert len(errors.strip().splitlines()) == 1
    else:
        assert process.returncode == -signum
    state = torch.load(stopped / "last.ckpt", weights_only=True)
    assert state["epoch"] < 11  # counted from 0: epochs were left to do
    assert call(*args, "--output", stopped, "--ckpt_path", stopped / "last.ckpt") == 0
    assert sha256(stopped / "model/model.safetensors") == sha256(straight / "model/model.safetensors")


def test_another_models_checkpoint_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("timeseries", "fit", "--config", config, "--output", run, "--trainer.max_epochs", 1) == 0
    capsys.readouterr()
    args = ("--config", config, "--output", run, "--model.arguments.d_model", 32)
    for action in (("test",), ("fit", "--ckpt_path", run / "last.ckpt")):
        assert call("timeseries", *action, *args) == 2
        assert "does not fit" in capsys.readouterr().err


def test_a_run_must_reach_its_first_validation(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("timeseries", "fit", "--config", config, "--output", tmp_path / "run", "--trainer.max_steps")
    assert call(*args, 5) == 2
    assert "max_steps 5 ends before the first validation" in capsys.readouterr().err
    assert call(*args, 5, "--trainer.limit_train_batches", 5) == 0
    late = ("--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 3)
    assert call(*args[:-1], *late, "--overwrite", "true") == 2
    assert "max_epochs 2 ends before the first validation" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere.ckpt", "https://example.org/last.ckpt"])
def test_a_checkpoint_must_be_a_local_file(config: Path, tmp_path: Path, path: str) -> None:
    task = options.find_task("timeseries")
    cli_ = training.make_cli("timeseries", task, "fit", ["--config", str(config), "--ckpt_path", path])
    with pytest.raises(UsageError, match="no checkpoint file"):
        training.fit("timeseries", cli_, tmp_path / "run")


def test_testing_before_fitting_says_so(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("timeseries", "test", "--config", config, "--output", tmp_path / "none") == 2
    assert "fit first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model: {nam: x}", "unknown key 'model.nam'; did you mean 'model.name'?"),
        ("model: {learning_rate: fast}", "model.learning_rate takes a number, not 'fast'"),
        ("model: {name: itransfomer}", "did you mean 'itransformer'?"),
        ("model: {arguments: {d_modell: 8}}", "did you mean 'd_model'?"),
        ("model: {arguments: {d_model: {class_path: os.system}}}", "model.arguments does not take"),
        ("data: {missing: ignore}", "data.missing takes refuse or mask, not 'ignore'"),
        ("data: {dataset: etth9}", "did you mean 'etth1'?"),
        ("trainer: {callbacks: [lightning.pytorch.callbacks.Timer]}", "unknown key 'trainer.callbacks'"),
        ("model: [", "this is no YAML"),
    ],
)
def test_config_errors_are_short(
    tmp_path: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(change + "\n")
    assert call("timeseries", "fit", "--config", path, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2
    assert "Traceback" not in error


@pytest.mark.parametrize("name", tasks("timeseries"))
def test_the_shipped_help_is_the_parsers(name: str) -> None:
    shipped = (options.CONFIGS / "timeseries" / "help" / f"{name}.txt").read_text()
    made = training.write_help("timeseries", options.find_task("timeseries", name))
    assert made == shipped, "run: python -m manyheads.apps.training"


def test_the_task_comes_from_the_option_or_the_config(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("task: forecats\n")
    with pytest.raises(UsageError, match="no timeseries task 'forecats'; did you mean 'forecast'"):
        options.task_of("timeseries", ["--config", str(config)])
    assert options.task_of("timeseries", [f"--config={config}", "--task", "forecast"]).name == "forecast"
    assert options.task_of("timeseries", []) is options.find_task("timeseries")


@pytest.mark.parametrize("name", options.configs("timeseries"))
def test_shipped_configs_begin_with_their_command_and_result_and_parse(name: str) -> None:
    path = options.resolve_config("timeseries", name)
    head = path.read_text().splitlines()[:8]
    assert head[0] == f"# manyheads timeseries fit --config {name}"
    result = {
        "forecast": ("MSE", "windows"),
        "classification": ("accuracy", "series"),
        "imputation": ("MSE", "windows", "interpolation"),
        "anomaly": ("AUROC", "rows"),
    }
    args = ["--config", str(path)]
    task = options.task_of("timeseries", args)
    assert any(all(word in line for word in result[task.name]) for line in head)
    if task.name == "classification" and not os.environ.get("MANYHEADS_DATA"):
        pytest.skip("MANYHEADS_DATA is not set: the series, whose sizes the model takes, are not downloaded")
    cli_ = training.make_cli("timeseries", task, "fit", args)
    assert cli_.config["model"]["name"]
