"""The tutorials' commands, one after the other, as a reader would run them; and the commands of all pages.

`pytest -m slow tests/docs` runs every tutorial; by default their commands are read alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from manyheads.apps import checking, cli, options
from manyheads.apps.options import configs
from manyheads.core.catalog import DOMAINS, create_model
from manyheads.core.datasets import datasets

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs" / "how-to" / "own-model.md"
PAGES = sorted({*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"} - {RECIPE})
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The manyheads commands of a page."""
    found = []
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in text.splitlines() if kind == "sh" else ():
            if line.startswith("manyheads "):
                found.append(shlex.split(line.partition(" > ")[0], comments=True)[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    for args in commands(page):
        command, *rest = args
        assert command in cli.COMMANDS, args
        if command in DOMAINS and rest and rest[0] in options.ACTIONS:
            named = [Path(name).stem for arg, name in pairwise(rest) if arg == "--config"]
            if named and not all(name in configs(command) for name in named):
                continue  # a file of the reader's
            checking.check(command, rest)


def test_the_core_in_python():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = (text for kind, text in BLOCK.findall(text) if kind == "python")
    exec(compile(block, "architecture.md", "exec"), {})


def test_pages_have_commands():
    assert sum(len(commands(page)) for page in PAGES) > 50


@pytest.mark.slow
@pytest.mark.timeout(1800)  # several trainings: minutes of CPU, on a machine that may have other work
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_tutorial_runs(domain, tmp_path):
    if domain != "timeseries" and not os.environ.get("MANYHEADS_DATA"):
        pytest.skip("needs MANYHEADS_DATA")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    page = ROOT / "docs" / "tutorials" / f"{domain}.md"
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        print(f"{text}\n{done.stdout}")


@pytest.mark.slow
def test_the_recipe_of_a_model_works(tmp_path):
    """The page's three files in a copy of the repository: its commands run there."""
    copy = tmp_path / "manyheads"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "site")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    text = RECIPE.read_text(encoding="utf-8")
    model, row, test = (block for kind, block in BLOCK.findall(text) if kind == "python")
    (copy / "timeseries/models/straight.py").write_text(model)
    catalog = copy / "timeseries/catalog.py"
    catalog.write_text(catalog.read_text() + f"\nMODELS = (*MODELS, {row.strip()})\n")
    (copy / "tests/timeseries/test_straight.py").write_text(test)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(copy / "src")
    (copy / "straight.yaml").write_text(
        re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    )
    fit = [sys.executable, "-m", "manyheads.apps.cli", "timeseries", "fit", "--config", "straight.yaml"]
    for command in (
        [sys.executable, "-m", "pytest", "tests/timeseries/test_straight.py", "tests/core/test_catalog.py"],
        [sys.executable, "-m", "pytest", "tests/core/test_hub.py", "-k", "straight"],
        [*fit, "--trainer.max_epochs", "1", "--output", "runs/straight"],
    ):
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (copy / "runs/straight/model/model.safetensors").is_file()


def test_the_figures_of_the_readme_are_those_of_the_pages():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for figure in yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text(encoding="utf-8")):
        shown = f"| {figure['metric']} {figure['ours']} | {figure['published']} |"
        assert f"| {figure['model']} | {figure['data']} {shown}" in text, figure
        domain, _, family = figure["family"].partition("/")
        assert (ROOT / domain / "models" / f"{family}.py").is_file(), figure
        assert not figure["config"] or figure["config"] in configs(domain), figure


def test_the_sizes_of_the_forecasters_are_those_of_their_configs():
    figures = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text(encoding="utf-8"))
    checked = 0
    for figure in figures:
        domain = figure["family"].partition("/")[0]
        if domain != "timeseries" or not figure["config"]:
            continue
        config = yaml.safe_load(options.resolve_config(domain, figure["config"]).read_text(encoding="utf-8"))
        if config.get("task", "forecast") == "forecast":
            steps = {name: config["data"][name] for name in ("seq_len", "pred_len")}
            model = create_model(config["model"]["name"], **steps, **config["model"].get("arguments", {}))
            assert f"{sum(p.numel() for p in model.parameters()):,}" == figure["parameters"], figure
            checked += 1
    assert checked == 8


def test_each_data_set_says_where_it_comes_from():
    origins = yaml.safe_load((ROOT / "docs" / "origins.yaml").read_text(encoding="utf-8"))
    by_hand = {
        each.name
        for each in datasets()
        if not each.files[0].embedded and not all(file.address for file in each.files)
    }
    assert set(origins) == by_hand
