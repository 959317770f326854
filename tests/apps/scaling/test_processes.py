"""Training by several processes: DDP and FSDP on CPUs, started by torchrun or by the command itself."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyheads.apps.curves import read_log

SCRIPT = Path(sys.executable).parent / "manyheads"
Small = Callable[..., list[str]]
NAMES = ("vision", "imputation", "anomaly", "recognition", "separation", "graph", "recsys")
EACH = ["timeseries", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)]
AVERAGED = {
    "vision": "--model.regularize.ema_decay",
    "recognition": "--model.optimizer.ema_decay",
    "separation": "--model.optimizer.ema_decay",
}
SPREAD = {"graph": "ddp_find_unused"}  # its last layer's edges are used by nothing
TWO = ("--trainer.devices", 2)


def figures(run: Path, action: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / f"{action}.json").read_text())
    return found


@pytest.mark.parametrize("name", EACH)
def test_two_processes_measure_what_one_does(
    name: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    """Every name: pytest -m "slow or not slow" tests/apps/scaling/test_processes.py (four minutes)."""
    run = tmp_path / "run"
    spread = (*TWO, "--trainer.strategy", SPREAD.get(name, "auto"))
    assert command(*small(name, options=spread), "--output", run, processes=2) == 0, command.printed
    assert command.printed[1] == ""  # the first process speaks
    assert command.printed[0].count("epoch  ") == 2
    log = read_log(run / "logs")
    assert len(log) == 2
    assert len(list((run / "logs").iterdir())) == 1
    for action in ("validate", "test"):
        assert command(*small(name, action, spread), "--output", run, processes=2) == 0, command.printed
        together = figures(run, action)
        assert command(*small(name, action), "--output", run) == 0, command.printed
        alone = figures(run, action)
        assert together.keys() == alone.keys()
        loss = {"val_loss", "val_decoder", "val_first", "val_count", "val_ctc"}  # means over batches
        exact = {key: value for key, value in alone.items() if name != "recognition" or key not in loss}
        assert {key: together[key] for key in exact} == pytest.approx(exact, rel=1e-4, abs=1e-6, nan_ok=True)
    best = log["val_loss"].min() if "val_loss" in log else None
    if best is not None and name in ("timeseries", "imputation", "anomaly"):
        assert figures(run, "validate")["val_loss"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_batches_twice_as_large(
    strategy: str, command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    double = ("--data.batch_size", 32, "--output", one)
    assert command(*small("timeseries", options=double, drops=False)) == 0, command.printed
    options = (*TWO, "--trainer.strategy", strategy, "--output", two)
    assert command(*small("timeseries", options=options, drops=False), processes=2) == 0, command.printed
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    losses = [read_log(run / "logs")[["train_loss", "val_loss"]].to_numpy() for run in (one, two)]
    assert losses[1][:, 1] == pytest.approx(losses[0][:, 1], rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", EACH)
def test_killed_processes_go_on_to_the_same_weights(
    name: str,
    strategy: str,
    command: Callable[..., int],
    small: Small,
    weights: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    if strategy == "fsdp" and name in SPREAD:
        pytest.skip("fsdp resumes parameters that are used alone")
    options = (*TWO, "--trainer.strategy", SPREAD.get(name, strategy))
    if strategy == "fsdp" and name in AVERAGED:
        options += (AVERAGED[name], 0)
    if name == "timeseries":
        options += ("--trainer.accumulate_grad_batches", 2)
    assert command(*small(name, options=options), "--output", straight, processes=2) == 0, command.printed
    again = (*options, "--save_every_n_steps", 1, "--output", killed)
    assert command(*small(name, options=again), processes=2, kill_at=2) == -9
    state = torch.load(killed / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["global_step"]) == (0, 1)
    (first, _), (second, _) = state["rng_states"]
    assert not first.equal(second)  # each process draws numbers of its own
    resume = (*again, "--ckpt_path", killed / "last.ckpt")
    assert command(*small(name, options=resume), processes=2) == 0, command.printed
    assert weights(killed) == weights(straight)


def test_a_position_within_an_epoch_is_of_its_batches(
    command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    options = ("--save_every_n_steps", 2, "--output", tmp_path)
    assert command(*small("timeseries"), *options, kill_at=3) == -9
    resume = (*options, "--ckpt_path", tmp_path / "last.ckpt")
    assert command(*small("timeseries", options=TWO), *resume, processes=2) == 2
    assert "within an epoch of batches of 16" in command.printed[0]
    half = (*TWO, "--data.batch_size", 8)  # the same samples a step
    assert command(*small("timeseries", options=half), *resume, processes=2) == 0, command.printed


def test_unused_parameters_are_answered_with_the_option(
    command: Callable[..., int], small: Small, tmp_path: Path
) -> None:
    assert command(*small("graph", options=TWO), "--output", tmp_path, processes=2) == 2
    assert "set trainer.strategy to ddp_find_unused" in command.printed[0]
    assert len(command.printed[0].strip().splitlines()) == 2  # one of them the run's first


def test_what_cannot_be_shared_is_refused(command: Callable[..., int], small: Small, tmp_path: Path) -> None:
    options = ("--trainer.strategy", "fsdp", "--output", tmp_path)
    assert command(*small("timeseries"), *options) == 2
    assert "set trainer.devices to 2 or more" in command.printed[0]
    options = (*TWO, "--trainer.strategy", "fsdp")
    assert command(*small("vision", options=options), "--output", tmp_path, processes=2) == 2
    assert "set ema_decay to 0" in command.printed[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_command_starts_its_processes_and_stops_them(
    signum: signal.Signals, small: Small, command: Callable[..., int], tmp_path: Path
) -> None:
    """With SIGKILL: pytest -m slow tests/apps/scaling/test_processes.py -k starts (a minute)."""
    args = [*small("timeseries", options=(*TWO, "--trainer.max_epochs", 400)), "--output", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [str(SCRIPT), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch  2/"):
                break
        process.send_signal(signum)
        _, errors = process.communicate(timeout=300)  # ends when the second process has closed the pipes, too
    if signum == signal.SIGTERM:
        assert process.returncode == 143, errors
        assert errors.strip().splitlines() == [
            f"manyheads: stopped by SIGTERM; go on with --ckpt_path {tmp_path / 'last.ckpt'}"
        ]
    else:
        assert process.returncode == -signum
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(state["rng_states"]) == 2
    if signum == signal.SIGTERM:  # a killed run has the state of an epoch before
        assert state["epoch"] >= 1
        assert not list(tmp_path.glob(".tmp-*.ckpt"))
