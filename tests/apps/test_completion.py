"""Shell completion: what is offered, that it is so in real shells, and that it needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.apps import cli, completion, options
from manyheads.core.catalog import DOMAINS, tasks

SCRIPT = Path(sys.executable).parent / "manyheads"
OFFERED = {
    "vis": ["vision"],
    "vision ": sorted([*options.ACTIONS, *options.TOOLS["vision"]]),
    "vision kn": ["knn"],
    "vision fit --config cct": ["cct_fashion_mnist"],
    "vision fit -c cct": ["cct_fashion_mnist"],
    "graph fit --config=gcn_cora_": ["--config=gcn_cora_links"],
    "graph fit --config gcn_cora --model.optimizer.learn": ["--model.optimizer.learning_rate"],
    "graph fit --config gcn_cora --model.arguments.hid": ["--model.arguments.hidden_dim"],
    "graph fit --config gcn_cora --model.best_by ": ["figure", "loss"],
    "graph fit --config gcn_cora --model.name kipf": ["kipf_gcn"],
    "recsys fit --data.dataset ml_1": ["ml_100k", "ml_1m"],
    "timeseries fit --task im": ["imputation"],
    "timeseries fit --task anomaly --data.dataset etth": ["etth1"],
    "graph explain --met": ["--method"],
    "graph explain --method at": ["attention", "attributions"],
    "graph explain --meth at": [],
    "predict --engine lo": ["local"],
    "predict --shard": ["--shard-size"],
    "--debug models sh": ["show"],
    "models show swin_tiny": ["swin_tiny_patch4_window7_224"],
    "models show cct_2 ": [],
    "models pull --opt": ["--option"],
    "models push --tim": ["--timm"],
    "jobs ": ["status"],
    "export --format ": ["onnx", "torch"],
    "serve --device c": ["cpu", "cuda"],
    "completion words ": [],
    "data get fashion": ["fashion_mnist"],
    "data list fashion": [],
    "completion ": ["bash", "fish", "zsh"],
    "nonsense ": [],
    "vision fit --config nonsense --model.na": [],
    "vision nonsense --model.na": [],
}


@pytest.mark.parametrize("typed", OFFERED)
def test_what_is_offered(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completion.complete(typed.split(" ")) == OFFERED[typed]


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_option_and_config_of_a_training_is_offered(domain: str) -> None:
    for task in tasks(domain):
        found = completion.complete([domain, "fit", "--task", task, "--"])
        assert set(found) >= set(options.known_options(domain, task))
    assert completion.complete([domain, "fit", "--config", ""]) == options.configs(domain)


def test_every_command_is_offered_with_its_options() -> None:
    assert set(completion.complete([""])) == set(cli.COMMANDS)
    for command in set(cli.COMMANDS) - set(DOMAINS):
        assert "--help" in completion.complete([command, "--"])


def test_a_file_of_that_name_comes_before_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completion.complete(["predict", "itransf"]) == ["itransformer"]
    (tmp_path / "itransformer_run").mkdir()
    assert completion.complete(["predict", "itransf"]) == []


def environment() -> dict[str, str]:
    path = f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}, "PATH": path}


def run(shell: str, commands: str, folder: Path, first: str = "") -> str:
    """Run commands in a shell that has read the script, with none of the user's own settings."""
    (folder / "script").write_text(completion.SCRIPTS[shell])
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *plain, "-c", f"{first}\nsource {folder / 'script'}\n{commands}"],
        capture_output=True,
        text=True,
        env={**environment(), "HOME": str(folder)},
        cwd=folder,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("manyheads vis", ["vision"]),
        ("manyheads vision fit --config ''", options.configs("vision")),
        ("manyheads graph fit --config = gcn_cora_l", ["gcn_cora_links"]),  # as bash cuts --config=gcn_cora_l
        ("manyheads graph fit --config =", options.configs("graph")),
        ("manyheads predict READ", []),
    ],
)
def test_in_bash(words: str, expected: list[str], tmp_path: Path) -> None:
    commands = f"""
    [[ $(complete -p manyheads) == *'-F _manyheads manyheads' ]] || exit 1
    COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _manyheads
    for word in "${{COMPREPLY[@]}}"; do echo "$word"; done"""
    assert run("bash", commands, tmp_path).split() == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_in_fish(tmp_path: Path) -> None:
    (tmp_path / "README.txt").touch()
    offered = run("fish", "complete -C 'manyheads graph fit --config gcn'", tmp_path)
    assert offered.split() == ["gcn_cora", "gcn_cora_links"]
    assert run("fish", "complete -C 'manyheads predict READ'", tmp_path).split() == ["README.txt"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_in_zsh(tmp_path: Path) -> None:
    commands = """
    compadd() { shift; print -l -- "$@" }
    _files() { print files }
    words=(manyheads graph fit --config gcn); CURRENT=5; _manyheads
    words=(manyheads predict READ); CURRENT=3; _manyheads"""
    offered = run("zsh", commands, tmp_path, first="autoload -U compinit && compinit -u -D")
    assert offered.split() == ["gcn_cora", "gcn_cora_links", "files"]


def test_the_scripts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, script in completion.SCRIPTS.items():
        assert cli.main(["completion", shell]) == 0
        assert capsys.readouterr().out == script
    assert cli.main(["completion", "bsh"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_words_need_no_torch() -> None:
    for typed in (
        ["graph", "fit", "--config", "gcn_cora", "--model."],
        ["models", "show", "s"],
        ["predict", "-"],
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                "-m",
                "manyheads.apps.cli",
                "completion",
                "words",
                "--",
                *typed,
            ],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
        )
        assert done.stdout
        names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
        assert not names & {"torch", "lightning", "pandas", "numpy", "pyarrow"}
