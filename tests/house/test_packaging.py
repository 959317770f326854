"""The wheel holds the whole house, and works away from the checkout."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (found,) = target.glob("*.whl")
    return found


def test_the_wheel_holds_every_source_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        etth1 = archive.read("manyheads/timeseries/datasets/ETTh1.csv")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    rooms = ("core/", "vision/", "timeseries/", "speech/", "graph/", "recsys/", "apps/")
    sources = {f"manyheads/{name}" for name in tracked if name.startswith(rooms) and name.endswith(".py")}
    assert len(sources) > 20
    assert {name for name in names if name.endswith(".py")} == sources | {"manyheads/__init__.py"}
    assert {"manyheads/py.typed", "manyheads/timeseries/datasets/ETT_LICENSE.txt"} <= names
    assert "manyheads/apps/configs/timeseries/itransformer_etth1_96.yaml" in names
    assert "manyheads/apps/configs/timeseries/help/forecast.txt" in names
    assert etth1 == (ROOT / "timeseries/datasets/ETTh1.csv").read_bytes()
    assert not any(name.startswith(("core/", "tests/", "benchmarks/")) for name in names)


def test_the_wheel_installed_elsewhere_is_imported_from_there(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "env"
    venv.create(target, with_pip=True)
    site = next(target.glob("lib/python*/site-packages"))
    # Dependencies are borrowed from this environment: the test is about our files, not their download.
    (site / "borrowed.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MANYHEADS_DATA")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env["MANYHEADS_CACHE"] = str(tmp_path / "cache")

    def call(*command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(target / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    code = (
        "import json, manyheads; from manyheads.core import datasets\n"
        "sizes = dict(seq_len=8, pred_len=4, d_model=16, n_heads=2, d_ff=16)\n"
        "model = manyheads.create_model('itransformer', **sizes)\n"
        "import torch\n"
        "shape = list(model(torch.randn(2, 8, 3)).shape)\n"
        "print(json.dumps([manyheads.__file__, str(datasets.locate('etth1')), shape]))"
    )
    module, data, shape = json.loads(call(target / "bin/python", "-c", code))
    assert module.startswith(str(site))
    assert data.startswith(str(site))
    assert shape == [2, 4, 3]
    assert "itransformer" in call(target / "bin/manyheads", "models")


def test_the_lock_pins_everything_with_hashes_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    pinned = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pinned) > 100
    assert all("==" in line and line.endswith("\\") for line in pinned)
    assert text.count("--hash=sha256:") > len(pinned)


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    locked = {
        line.split("==")[0].lower()
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].strip().lower().replace("_", "-")
        assert name in locked or name == "manyheads", requirement
