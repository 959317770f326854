"""The command line answers at once, and imports no torch to do it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.apps import options
from manyheads.apps.cli import COMMANDS, MODULES
from manyheads.core.catalog import DOMAINS

SCRIPT = Path(sys.executable).parent / "manyheads"
HEAVY = ("torch", "lightning", "pandas", "numpy", "pyarrow", "huggingface_hub", "ray", "fastapi", "gradio")


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


FIT = ["timeseries", "fit", "--config", "itransformer_etth1_96"]
FAST = {
    "no command": ([], 2),
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "models": (["models"], 0),
    "models json": (["models", "list", "--json"], 0),
    "models by pattern": (["models", "list", "swin*"], 0),
    "models of no such pattern": (["models", "list", "swni*"], 2),
    "vision model": (["models", "show", "vim_tiny_patch16_224"], 0),
    "data": (["data", "list"], 0),
    "data of no such name": (["data", "get", "coraa"], 2),
    "completion": (["completion", "bash"], 0),
    "words to complete": (["completion", "words", "--", *FIT, "--model."], 0),
    **{f"{command} help": ([command, "--help"], 0) for command in COMMANDS},
    **{f"{command}, wrong option": ([command, "--nonsens"], 2) for command in MODULES},
    **{f"{domain} fit help": ([domain, "fit", "--help"], 0) for domain in DOMAINS},
    **{
        f"{domain} wrong option": ([domain, "fit", "-c", options.configs(domain)[0], "--nonsens"], 2)
        for domain in DOMAINS
    },
    **{
        f"{domain} {tool} help": ([domain, tool, "--help"], 0)
        for domain, tools in options.TOOLS.items()
        for tool in tools
    },
    "wrong option of a vision tool": (["vision", "knn", "m", "--tran", "x"], 2),
    "wrong command": (["modles"], 2),
    "wrong training option": ([*FIT, "--model.nam", "x"], 2),
    "wrong nested option": ([*FIT, "--model.learnin_rate", "1"], 2),
    "wrong value": ([*FIT, "--trainer.max_epochs", "many"], 2),
    "wrong argument of a model": ([*FIT, "--model.arguments.d_modle", "3"], 2),
    "wrong config": (["timeseries", "fit", "--config", "itransformer_etth1"], 2),
    "wrong model": (["models", "show", "itransfomer"], 2),
    "quickstart in a full folder": (["quickstart", "-o", str(Path(__file__).parent)], 2),
}


@pytest.mark.parametrize("name", FAST)
def test_answers_without_torch_in_less_than_a_second(name: str, tmp_path: Path) -> None:
    args, code = FAST[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "manyheads.apps.cli", *args],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    # CPU time: how long others keep the machine busy is not the command's doing.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line
    }
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code, said
    assert "manyheads" in imported
    assert not imported & set(HEAVY)
    assert "Traceback" not in done.stderr
    if code and args:
        assert 1 <= len(said) <= 2


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
