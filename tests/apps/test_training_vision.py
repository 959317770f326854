"""Training image classifiers through the command line: reports, labels, averaged weights, resuming."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from manyheads.apps import cli, options, training
from manyheads.apps.curves import read_log
from manyheads.core import hub

SCRIPT = Path(sys.executable).parent / "manyheads"
DATA = os.environ.get("MANYHEADS_DATA")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small models are slower on several; processes that are started take it over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny ViT on a folder of four classes: the bright quarter of a noisy image of 8 x 8."""
    rng = np.random.default_rng(0)
    for k, label in enumerate(("north_west", "north_east", "south_west", "south_east")):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(60):
            pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[4 * (k // 2) :][:4, 4 * (k % 2) :][:, :4] += 100
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""seed_everything: 3
patience: 99
model:
  name: vit_tiny_patch16_224
  arguments: {{patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}
  optimizer: {{learning_rate: 3.0e-3, layer_decay: 0.9}}
  schedule: {{warmup_epochs: 0.5}}
  regularize: {{mixup: 0.2, cutmix: 1.0, drop_path: 0.1, drop_rate: 0.1, ema_decay: 0.9}}
data:
  dataset: {tmp_path / "images"}
  batch_size: 12
  augment: {{pad: 1, flip: false, randaugment: 1, erasing: 0.2}}
trainer:
  max_epochs: 3
  accumulate_grad_batches: 2
"""
    )
    return path


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def test_fit_test_and_the_model_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("vision", "fit", "--config", config, "--output", run) == 0
    printed = capsys.readouterr().out
    assert printed.count("val_top1") == 3 + 1  # a line an epoch, and the best
    assert (run / "curves.png").stat().st_size > 5000
    assert list(read_log(run / "logs").index) == [1, 2, 3]
    folder = hub.read_config(run / "model")
    assert folder.labels == ["north_east", "north_west", "south_east", "south_west"]
    assert folder.preprocessing["temperature"] > 0  # type: ignore[operator]
    best = torch.load(run / "best.ckpt", weights_only=True)
    weights = load_file(run / "model" / "model.safetensors")
    assert all(value.equal(best["state_dict"][f"model.{name}"]) for name, value in weights.items())
    assert not weights["head.weight"].equal(best["current_model_state"]["model.head.weight"])
    log = read_log(run / "logs")
    assert folder.training["best_val_top1"] == pytest.approx(log["val_top1"].max())

    assert call("vision", "test", "--config", config, "--output", run) == 0
    printed = capsys.readouterr().out
    assert "south_west" in printed
    assert "recall" in printed
    figures = json.loads((run / "test.json").read_text())
    assert figures["test_images"] == 48
    assert figures["test_temperature"] == pytest.approx(folder.preprocessing["temperature"])
    assert pd.read_csv(run / "report.csv")["support"].tolist() == [12] * 4
    assert pd.read_csv(run / "confusion.csv", index_col=0).to_numpy().sum() == 48
    for picture in ("confusion.png", "reliability.png"):
        assert (run / picture).stat().st_size > 5000

    assert call("vision", "predict", "--config", config, "--output", run) == 0
    rows = pd.concat([pd.read_parquet(part) for part in (run / "predictions").glob("part-*.parquet")])
    assert len(rows) == 240


def test_several_labels_some_unknown(config: Path, tmp_path: Path) -> None:
    paths = sorted(str(path) for path in (tmp_path / "images").rglob("*.png"))
    table = pd.DataFrame({"image": paths})
    table["north"] = table["image"].str.contains("north").astype(float)
    table["west"] = table["image"].str.contains("west").astype(float)
    table.loc[::5, "west"] = np.nan
    table.to_csv(tmp_path / "labels.csv", index=False)
    run = tmp_path / "run"
    args = ["--config", config, "--output", run, "--trainer.max_epochs", 1]
    args += ["--data.dataset", tmp_path / "labels.csv", "--data.columns.label", '["north", "west"]']
    args += ["--model.loss.pos_weight", "balanced"]
    assert call("vision", "fit", *args) == 0
    assert call("vision", "test", *args) == 0
    assert "best_val_map" in hub.read_config(run / "model").training
    report = pd.read_csv(run / "report.csv")
    assert report["label"].tolist() == ["north", "west"]
    assert report["known"][1] < report["known"][0] == 48
    assert not (run / "confusion.csv").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_goes_on_to_the_same_weights(
    config: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    args = ["vision", "fit", "--config", str(config), "--trainer.max_epochs", "8"]
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
    if signum == signal.SIGTERM:
        assert process.returncode == 143, errors
        assert f"--ckpt_path {stopped / 'last.ckpt'}" in errors
    else:
        assert process.returncode == -signum
    state = torch.load(stopped / "last.ckpt", weights_only=True)
    assert state["epoch"] < 7  # counted from 0: epochs were left to do
    if signum == signal.SIGTERM:  # in the middle of an epoch
        assert state["global_step"] % 7 != 0  # 172 train images, 12 a batch, 2 batches a step
    assert call(*args, "--output", stopped, "--ckpt_path", stopped / "last.ckpt") == 0
    for name in ("last.ckpt", "best.ckpt"):
        there, here = (torch.load(run / name, weights_only=True) for run in (straight, stopped))
        for key in ("state_dict", "current_model_state"):
            assert all(value.equal(here[key][name]) for name, value in there[key].items()), (name, key)
    assert (straight / "model/model.safetensors").read_bytes() == (
        stopped / "model/model.safetensors"
    ).read_bytes()
    logs = [read_log(run / "logs").filter(like="val_") for run in (straight, stopped)]
    assert len(logs[0]) == 8
    pd.testing.assert_frame_equal(*logs)


def test_a_probe_of_a_trained_backbone(config: Path, tmp_path: Path) -> None:
    first, probe = tmp_path / "first", tmp_path / "probe"
    once = ("--trainer.max_epochs", 1, "--model.schedule.warmup_epochs", 0)
    assert call("vision", "fit", "--config", config, "--output", first, *once) == 0
    args = ("--model.transfer.weights", first, "--model.transfer.freeze", "probe")
    assert call("vision", "fit", "--config", config, "--output", probe, *once, *args) == 0
    before, after = (load_file(run / "model" / "model.safetensors") for run in (first, probe))
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model: {name: vit_tinny_patch16_224}", "did you mean 'vit_tiny_patch16_224'"),
        ("model: {arguments: {num_classes: 3}}", "model.arguments.num_classes is decided by the data"),
        ("model: {optimizer: {learning_rat: 1}}", "learning_rat"),
        ("model: {loss: {pos_weight: balanced}}", "one takes loss.class_weights"),
        ("model: {transfer: {weights: nowhere.safetensors}}", "no file nowhere.safetensors"),
        ("model: {schedule: {warmup_epochs: 3}}", "the whole run of"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    config: Path, tmp_path: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(change)
    run = ("--output", tmp_path / "run")
    assert call("vision", "fit", "--config", config, "--config", other, *run) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2


def test_the_shipped_help_is_the_parsers() -> None:
    shipped = (options.CONFIGS / "vision" / "help" / "classification.txt").read_text()
    made = training.write_help("vision", options.find_task("vision", "classification"))
    assert made == shipped, "run: python -m manyheads.apps.training"


@pytest.mark.parametrize("name", options.configs("vision"))
def test_shipped_configs_begin_with_their_command_and_run_on_their_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = options.resolve_config("vision", name)
    head = path.read_text().splitlines()[:8]
    assert head[0] == f"# manyheads vision fit --config {name}"
    assert any(line.startswith("# Result: ") for line in head)
    if not DATA:
        pytest.skip("MANYHEADS_DATA is not set: the images are not downloaded")
    limits = {"max_steps": 2, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    args = [part for key, value in limits.items() for part in (f"--trainer.{key}", value)]
    args += ["--model.schedule.warmup_epochs", 0, "--data.batch_size", 16, "--output", tmp_path]
    assert call("vision", "fit", "--config", name, *args) == 0
    assert call("vision", "test", "--config", name, *args) == 0
    assert json.loads((tmp_path / "test.json").read_text())["test_images"] == 16
