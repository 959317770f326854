"""Training a recogniser through the command line: connected digits, a table of one's own, resuming."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from manyheads.apps import cli, options, training
from manyheads.apps.curves import read_log
from manyheads.core import hub

SCRIPT = Path(sys.executable).parent / "manyheads"
DATA = os.environ.get("MANYHEADS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MANYHEADS_DATA names no folder of shared data")
CONFIG = "paraformer_tiny_digits"
SMALL = """\
trainer: {max_epochs: 3, accumulate_grad_batches: 2}
model:
  arguments: {dim: 32, units: 64, encoder_blocks: 2, decoder_blocks: 1, dropout: 0.1}
  optimizer: {learning_rate: 3.0e-3, warmup_steps: 3, ema_decay: 0.9}
data:
  joining: {train: 60, val: 12, test: 18, longest: 3}
  loading: {batch_seconds: 20, buckets: 4, cmvn_seconds: 30}
"""


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are slower on several; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The shipped config, with a smaller model and fewer digits."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return ["--config", CONFIG, "--config", str(path)]


def call(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


@needs_data
def test_fit_validate_test_and_predict(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call("speech", "fit", *small, "--output", run) == 0
    assert capsys.readouterr().out.count("val_cer") == 3 + 1  # a line an epoch, and the best
    assert (run / "curves.png").stat().st_size > 5000
    log = read_log(run / "logs")
    assert {"train_decoder", "train_count", "train_ctc", "val_cer", "val_wer"} <= set(log.columns)
    folder = hub.read_config(run / "model")
    assert folder.training["best_val_cer"] == pytest.approx(log["val_cer"].min())
    assert folder.preprocessing["sample_rate"] == 8000
    best = torch.load(run / "best.ckpt", weights_only=True)
    name = "model.decoder.output_layer.weight"
    assert not best["state_dict"][name].equal(best["current_model_state"][name])  # averaged
    assert call("speech", "validate", *small, "--output", run) == 0
    found = json.loads((run / "validate.json").read_text())
    assert found["val_cer"] == pytest.approx(log["val_cer"].min())
    assert call("speech", "test", *small, "--output", run) == 0
    assert "normaliser: none" in capsys.readouterr().out
    tested = json.loads((run / "test.json").read_text())
    assert tested["test_utterances"] == 18
    texts = pd.read_csv(run / "texts.csv", dtype=str)
    assert len(texts) == 18
    assert (run / "errors.png").stat().st_size > 5000

    assert call("speech", "predict", *small, "--output", run) == 0
    rows = pd.concat([pd.read_parquet(part) for part in (run / "predictions").glob("part-*.parquet")])
    assert set(rows["id"]) == set(texts["id"])

    further = tmp_path / "further"
    more = ("--model.start", run / "model", "--model.objective.mwer", 0.1, "--trainer.max_epochs", 1)
    assert call("speech", "fit", *small, "--output", further, *more) == 0
    assert "train_mwer" in read_log(further / "logs")
    assert hub.read_config(further / "model").preprocessing == folder.preprocessing
    assert call("speech", "test", "--config", further / "config.yaml") == 0


@needs_data
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_or_killed_run_goes_on_to_the_same_weights(
    small: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    args = ["speech", "fit", *small, "--trainer.max_epochs", "4"]
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
    assert state["epoch"] < 3  # counted from 0: epochs were left to do
    if signum == signal.SIGTERM:  # in the middle of an epoch
        steps = torch.load(straight / "last.ckpt", weights_only=True)["global_step"] // 4
        assert steps > 2
        assert state["global_step"] % steps != 0
    assert call(*args, "--output", stopped, "--ckpt_path", stopped / "last.ckpt") == 0
    for name in ("last.ckpt", "best.ckpt"):
        there, here = (torch.load(run / name, weights_only=True) for run in (straight, stopped))
        for key in ("state_dict", "current_model_state"):
            assert all(value.equal(here[key][name]) for name, value in there[key].items()), (name, key)
    logs = [read_log(run / "logs").filter(like="val_") for run in (straight, stopped)]
    assert len(logs[0]) == 4
    pd.testing.assert_frame_equal(*logs)


@needs_data
def test_a_table_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Path(str(DATA)) / "speech" / "ljspeech_samples" / "metadata.csv"
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"""trainer: {{max_epochs: 1}}
model:
  arguments: {{dim: 32, heads: 2, units: 64, encoder_blocks: 2, decoder_blocks: 1}}
  optimizer: {{warmup_steps: 1}}
  normalizer: basic
data:
  dataset: {table}
  columns: {{audio: file}}
  splits: {{val_share: 0.1, test_share: 0.1}}
  units: {{kind: sentencepiece, size: 100, normalizer: basic}}
  loading: {{batch_seconds: 30}}
"""
    )
    args = ("--task", "recognition", "--config", config, "--output", tmp_path / "run")
    assert call("speech", "fit", *args) == 0
    assert call("speech", "test", *args) == 0
    assert "normaliser: basic" in capsys.readouterr().out
    assert hub.read_config(tmp_path / "run" / "model").preprocessing["tokens"]["kind"] == "sentencepiece"  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model: {objective: {ctc: 1.0}}", "ctc must be from 0 to below 1"),
        ("model: {arguments: {vocab_size: 3}}", "model.arguments.vocab_size is decided by the data"),
        ("model: {optimizer: {learning_rat: 1}}", "learning_rat"),
        ("data: {augment: {speeds: []}}", "augment.speeds"),
        ("data: {loading: {batch_seconds: 2}}", "raise loading.batch_seconds"),
        ("data: {sample_rate: 16000}", "set data.sample_rate"),
        ("data: {dataset: nowhere.csv}", "nowhere.csv"),
    ],
)
@needs_data
def test_wrong_options_are_refused_in_a_line(
    small: list[str], tmp_path: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(change)
    assert call("speech", "fit", *small, "--config", other, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2


def test_the_shipped_help_is_the_parsers() -> None:
    shipped = (options.CONFIGS / "speech" / "help" / "recognition.txt").read_text()
    made = training.write_help("speech", options.find_task("speech", "recognition"))
    assert made == shipped, "run: python -m manyheads.apps.training"


def test_the_shipped_config_begins_with_its_command_and_result() -> None:
    head = options.resolve_config("speech", CONFIG).read_text().splitlines()[:8]
    assert head[0] == f"# manyheads speech fit --config {CONFIG}"
    assert any(line.startswith("# Result: ") for line in head)
