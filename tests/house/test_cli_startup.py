"""The command line answers at once, and imports no torch to do it."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).parent / "manyheads"
HEAVY = ("torch", "lightning", "pandas", "numpy", "pyarrow")


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def call(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *args], capture_output=True, text=True, env=environment(), check=False)


@pytest.mark.parametrize(
    "module", ["manyheads", "manyheads.apps.cli", "manyheads.core.catalog", "manyheads.core.hub"]
)
def test_import_names_no_heavy_module(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "manyheads" in names
    assert not names & set(HEAVY)


FAST = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "models": (["models"], 0),
    "models json": (["models", "list", "--json"], 0),
    "models by pattern": (["models", "list", "swin*"], 0),
    "models of no such pattern": (["models", "list", "swni*"], 2),
    "vision model": (["models", "show", "vim_tiny_patch16_224"], 0),
    "data": (["data", "list"], 0),
    "domain help": (["timeseries", "--help"], 0),
    "fit help": (["timeseries", "fit", "--help"], 0),
    "vision help": (["vision", "fit", "--help"], 0),
    "vision tool's help": (["vision", "explain", "--help"], 0),
    "wrong option of a vision tool": (["vision", "knn", "m", "--tran", "x"], 2),
    "wrong command": (["modles"], 2),
    "wrong option": (["predict", "--ouput", "x"], 2),
    "wrong training option": (
        ["timeseries", "fit", "--config", "itransformer_etth1_96", "--model.nam", "x"],
        2,
    ),
    "wrong config": (["timeseries", "fit", "--config", "itransformer_etth1"], 2),
    "wrong model": (["models", "show", "itransfomer"], 2),
}


@pytest.mark.parametrize("name", FAST)
def test_answers_in_under_a_second(name: str) -> None:
    args, code = FAST[name]
    call(*args)  # the first call writes the bytecode
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = call(*args)
        times.append(time.perf_counter() - start)
        assert done.returncode == code, done.stderr
    assert statistics.median(times) < 1.0
    if code:
        assert len(done.stderr.strip().splitlines()) <= 2
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "suggestion"),
    [
        (["modles"], "'models'"),
        (["predict", "m", "i", "--otput", "x", "-o", "o"], "'--output'"),
        (["timeseries", "fti"], "'fit'"),
        (
            ["timeseries", "fit", "--config", "itransformer_etth1_96", "--model.learnin_rate", "1"],
            "learning_rate",
        ),
        (["timeseries", "fit", "--config", "itransformer_eth1_96"], "'itransformer_etth1_96'"),
        (["models", "show", "itransfomer"], "'itransformer'"),
    ],
)
def test_a_slip_is_answered_with_the_right_name(args: list[str], suggestion: str) -> None:
    done = call(*args)
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert suggestion in done.stderr
