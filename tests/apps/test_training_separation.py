"""Training a separator through the command line: real voices, finished mixtures, resuming, slips."""

import json
import math
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
CONFIG = "mossformer_tiny_librimix"
SMALL = """\
trainer: {max_epochs: 3}
model:
  fresh: published
  arguments: {dim: 16, depth: 1, kernel_size: 64, query_key_dim: 8, group_size: 64}
  optimizer: {learning_rate: 3.0e-3, warmup_steps: 2, ema_decay: 0.9}
data:
  batch_size: 2
  mixing: {seconds: 0.5}
  loading: {epoch_mixtures: 10, val_mixtures: 2, test_mixtures: 3}
"""


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such small models are slower on several; what is written to the cache is this test's alone."""
    torch.set_num_threads(1)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """The shipped config, with a smaller model and fewer mixtures."""
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
    assert capsys.readouterr().out.count("val_si_sdri") == 3 + 1  # a line an epoch, and the best
    assert (run / "curves.png").stat().st_size > 5000
    log = read_log(run / "logs")
    folder = hub.read_config(run / "model")
    assert folder.training["best_val_si_sdri"] == pytest.approx(log["val_si_sdri"].max())
    assert folder.preprocessing == {"sample_rate": 8000}
    assert folder.arguments["num_spks"] == 2
    best = torch.load(run / "best.ckpt", weights_only=True)
    name = "model.mask_net.conv1d_out.weight"
    assert not best["state_dict"][name].equal(best["current_model_state"][name])  # averaged
    assert call("speech", "validate", *small, "--output", run) == 0
    found = json.loads((run / "validate.json").read_text())
    assert found["val_si_sdri"] == pytest.approx(log["val_si_sdri"].max(), abs=1e-4)

    assert call("speech", "test", *small, "--output", run) == 0
    assert "SI-SDRi " in capsys.readouterr().out
    figures = json.loads((run / "test.json").read_text())
    table = pd.read_csv(run / "mixtures.csv")
    columns = ["id", "seconds", "si_sdri", "si_sdr", "mixture_si_sdr", "si_sdr_1", "si_sdr_2", "order"]
    assert list(table.columns) == columns
    assert len(table) == figures["test_mixtures"] == 3
    assert table.si_sdri.mean() == pytest.approx(figures["test_si_sdri"], abs=1e-3)
    assert table.si_sdri.median() == pytest.approx(figures["test_si_sdri_median"], abs=1e-3)
    assert table[["si_sdr_1", "si_sdr_2"]].mean(axis=1).to_numpy() == pytest.approx(table.si_sdr, abs=2e-3)
    assert (run / "mixtures.png").stat().st_size > 5000

    finished = ("--data.evaluation", "libri2mix_debug")
    assert call("speech", "test", *small, "--output", run, *finished) == 0
    figures = json.loads((run / "test.json").read_text())
    assert figures["test_mixtures"] == 8
    assert figures["test_mixture_si_sdr"] == pytest.approx(-1.5651, abs=1e-3)  # as recorded
    assert call("speech", "predict", *small, "--output", run, *finished) == 0
    parts = (run / "predictions").glob("part-*.parquet")
    assert sum(len(pd.read_parquet(part)) for part in parts) >= 8


@needs_data
def test_a_training_goes_on_from_a_model_folder(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, once = tmp_path / "run", ("--trainer.max_epochs", 1)
    assert call("speech", "fit", *small, *once, "--output", run) == 0
    going_on = ("speech", "fit", *small, *once, "--model.start", run / "model", "--output")
    idle = ("--model.optimizer.learning_rate", 1e-12, "--model.optimizer.ema_decay", 0)
    assert call(*going_on, tmp_path / "on", *idle) == 0
    before, after = (hub.load_model(folder / "model")[0] for folder in (run, tmp_path / "on"))
    for (key, there), here in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        torch.testing.assert_close(there, here, atol=1e-8, rtol=0, msg=key)
    assert call(*going_on, tmp_path / "off", "--data.sample_rate", 16000) == 2
    assert "is for 8000 Hz: set data.sample_rate to that" in capsys.readouterr().err


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_goes_on_to_the_same_weights(
    small: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    args = ["speech", "fit", *small, "--trainer.max_epochs", "4", "--data.loading.epoch_mixtures", "20"]
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
    assert call(*args, "--output", stopped, "--ckpt_path", stopped / "last.ckpt") == 0
    for name in ("last.ckpt", "best.ckpt"):
        there, here = (torch.load(run / name, weights_only=True) for run in (straight, stopped))
        for key in ("state_dict", "current_model_state"):
            assert all(value.equal(here[key][name]) for name, value in there[key].items()), (name, key)
    logs = [read_log(run / "logs").filter(like="val_") for run in (straight, stopped)]
    assert len(logs[0]) == 4
    pd.testing.assert_frame_equal(*logs)


@needs_data
def test_three_voices_in_rooms_with_noise(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--data.speakers", 3, "--data.mixing.mode", "max", "--data.mixing.reverberation", 0.5)
    more += ("--data.mixing.noise", "white", "--data.mixing.target", "dry", "--data.loading.workers", 1)
    assert call("speech", "fit", *small, "--trainer.max_epochs", 1, "--output", run, *more) == 0
    assert hub.read_config(run / "model").arguments["num_spks"] == 3
    assert call("speech", "test", "--config", run / "config.yaml") == 0
    table = pd.read_csv(run / "mixtures.csv")
    assert {"si_sdr_1", "si_sdr_2", "si_sdr_3"} <= set(table.columns)
    assert table.si_sdri.map(math.isfinite).all()


@needs_data
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model: {arguments: {num_spks: 3}}", "num_spks is decided by data.speakers"),
        ("model: {arguments: {dims: 3}}", "dims"),
        ("model: {optimizer: {learning_rat: 1}}", "learning_rat"),
        ("model: {fresh: cosines}", "model.fresh"),
        ("model: {fresh: cosine}", "as many features as a frame has samples: 64, not 16"),
        ("model: {name: paraformer}", "paraformer is not trained here: it is for recognition"),
        ("data: {speakers: 9}", "data.speakers must be from 1 to 5"),
        ("data: {mixing: {speeds: []}}", "mixing.speeds"),
        ("data: {dataset: libri2mix_debug}", "give it as data.evaluation"),
        ("data: {dataset: librispeach_speakers}", "did you mean 'librispeech_speakers'"),
        ("data: {dataset: nowhere/at/all}", "nowhere/at/all"),
        ("data: {batch_size: 11}", "raise loading.epoch_mixtures"),
    ],
)
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
    shipped = (options.CONFIGS / "speech" / "help" / "separation.txt").read_text()
    made = training.write_help("speech", options.find_task("speech", "separation"))
    assert made == shipped, "run: python -m manyheads.apps.training"


def test_the_shipped_config_begins_with_its_command_and_result() -> None:
    head = options.resolve_config("speech", CONFIG).read_text().splitlines()[:8]
    assert head[0] == f"# manyheads speech fit --config {CONFIG}"
    assert any(line.startswith("# Result: ") and "SI-SDRi" in line for line in head)
