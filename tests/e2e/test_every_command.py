"""Each command on each domain, as a user types it, with what it says looked at.

`pytest -m slow tests/e2e` clones the repository, installs it by the README and takes about half an hour on
two quiet cores, most of it the quickstarts. `pytest -m slow tests/e2e --here` uses this environment, and
`-k "not quickstart"` leaves the tours out. What every command printed is kept in `said.txt` of its folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MANYHEADS_DATA" not in os.environ, reason="MANYHEADS_DATA names no folder"),
    pytest.mark.timeout(3600),
]
SMALL = [
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "4",
    "--trainer.limit_test_batches",
    "2",
]
SMALL += ["--trainer.limit_val_batches", "2", "--output", "run"]


@dataclass(frozen=True)
class Domain:
    """What one domain is tried with.

    Args:
        config: A shipped config.
        source: The function of the tours that writes the job's input; molecules are written here.
        input: What it wrote.
        test: What the test prints.
        columns: Of the job's rows.
        tools: Commands of the domain's own, each with what it prints or writes.
        exported: The format that the model is exported to.
        options: More options of the training.
    """

    config: str
    source: str
    input: str
    test: str
    columns: frozenset[str]
    tools: dict[tuple[str, ...], str] = field(default_factory=dict)
    exported: str = "onnx"
    options: tuple[str, ...] = ()


ROWS = frozenset({"id", "label", "probability"})
DOMAINS = {
    "timeseries": Domain(
        "itransformer_etth1_96",
        "history",
        "run/history.csv",
        r"test_mse +[\d.]+",
        frozenset({"unique_id", "ds", "yhat"}),
        {
            ("backtest", "run/model", "etth1", "--windows", "3"): "MSE",
            ("plot", "run/model", "etth1", "-o", "plot.png", "--truth"): "plot.png",
        },
    ),
    "vision": Domain(
        "cct_fashion_mnist",
        "photos",
        "run/photos",
        r"test_top1 +[\d.]+",
        ROWS,
        {
            ("explain", "run/model", "run/photos", "-o", "maps"): "maps",
            ("knn", "run/model", "--train", "cifar10_10k"): "top-1",
        },
        options=("--model.schedule.warmup_epochs", "0"),
    ),
    "speech": Domain(
        "paraformer_tiny_digits",
        "recordings",
        "run/recordings",
        r"test_cer +[\d.]+",
        frozenset({"id", "text"}),
        exported="torch",
        options=("--model.optimizer.warmup_steps", "1"),
    ),
    "graph": Domain(
        "esol",
        "",
        "molecules.csv",
        r"test_rmse +[\d.]+",
        frozenset({"id", "log_solubility"}),
        {("explain", "run/model", "molecules.csv", "-o", "why", "--most", "1"): "in why: "},
        exported="torch",
        options=("--model.optimizer.warmup_steps", "1"),
    ),
    "recsys": Domain(
        "sasrec_ml_100k",
        "log",
        "run/log.csv",
        r"ndcg@10 +[\d.]+ +[\d.]+",
        frozenset({"user_id", "rank", "item_id", "score"}),
        options=("--trainer.check_val_every_n_epoch", "1", "--model.optimizer.warmup_steps", "1"),
    ),
}
MOLECULES = ["CCO", "CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1", "CCCCCCCC", "OCC(O)CO"]


class Shell:
    """Runs commands in one folder, and keeps what they said."""

    def __init__(self, script: Path, folder: Path) -> None:
        self.script, self.folder = script, folder
        unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        self.environment = {k: v for k, v in os.environ.items() if k not in unset}
        self.environment["PATH"] = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
        self.environment["MANYHEADS_CACHE"] = str(folder / "cache")

    def python(self, code: str) -> None:
        """Run Python of the same environment."""
        subprocess.run(
            [self.script.parent / "python", "-c", code], cwd=self.folder, env=self.environment, check=True
        )

    def __call__(self, *args: object, code: int = 0, **environment: str) -> str:
        """Run a command, expect its exit code, and return its output and its errors."""
        done = subprocess.run(
            [self.script, *map(str, args)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with (self.folder / "said.txt").open("a") as said:
            said.write(f"$ manyheads {' '.join(map(str, args))}\n{done.stdout}[{done.returncode}]\n\n")
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        assert "Warning" not in done.stdout, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def shell(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shell]:
    """A shell in a folder of that name; the same one each time."""
    made: dict[str, Shell] = {}

    def of(name: str) -> Shell:
        if name not in made:
            made[name] = Shell(script, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.fixture
def trained(shell: Callable[[str], Shell], request: pytest.FixtureRequest) -> Shell:
    """A shell in a folder with a run of the domain that a test is given, and the job's input."""
    name = request.getfixturevalue("domain")
    here = shell(name)
    if not (here.folder / "run/model").exists():
        about = DOMAINS[name]
        said = here(name, "fit", "--config", about.config, *SMALL, *about.options)
        assert re.search(r"[\d,]+ parameters; run folder run", said)
        assert "model folder run/model" in said
        assert f"next: manyheads {name} test --config run/config.yaml" in said
        if about.source:
            first = "from pathlib import Path; from manyheads.apps import tour_pieces"
            here.python(f"{first}; tour_pieces.{about.source}(Path('run'))")
        else:
            (here.folder / about.input).write_text("\n".join(["smiles", *MOLECULES]) + "\n")
    return here


def each_domain(test: Any) -> Any:
    return pytest.mark.parametrize("domain", DOMAINS)(test)


@each_domain
def test_validate_and_test(trained: Shell, domain: str) -> None:
    assert "written to run/validate.json" in trained(domain, "validate", "--config", "run/config.yaml")
    said = trained(domain, "test", "--config", "run/config.yaml")
    assert re.search(DOMAINS[domain].test, said), said
    assert "written to run/test.json" in said


@each_domain
def test_predict_and_jobs(trained: Shell, domain: str) -> None:
    said = trained("predict", "run/model", DOMAINS[domain].input, "-o", "out")
    assert re.search(r"\d+ records, \d+ rows, 0 bad -> out", said), said
    trained.python(
        "import glob, pandas; "
        "table = pandas.concat(map(pandas.read_parquet, glob.glob('out/part-*.parquet'))); "
        f"assert len(table) and set(table) >= {set(DOMAINS[domain].columns)}, list(table)"
    )
    assert re.search(r"finished|done", trained("jobs", "status", "out"))
    assert json.loads(trained("jobs", "status", "out", "--json"))
    assert "out" in trained("predict", "run/model", DOMAINS[domain].input, "-o", "out", code=2)
    trained("predict", "run/model", DOMAINS[domain].input, "-o", "out", "--resume")


@each_domain
def test_models_verify_show_and_export(trained: Shell, domain: str) -> None:
    assert "run/model" in trained("models", "verify", "run/model")
    name = json.loads((trained.folder / "run/model/config.json").read_text())["name"]
    assert domain in trained("models", "show", name)
    file = f"model.{'onnx' if DOMAINS[domain].exported == 'onnx' else 'pt2'}"
    said = trained("export", "run/model", "--format", DOMAINS[domain].exported, "-o", file)
    assert "(inputs: of " in said, said  # real ones
    assert (trained.folder / file).stat().st_size > 10_000
    assert json.loads((trained.folder / f"{file}.json").read_text())


def question(domain: str, folder: Path) -> dict[str, Any]:
    """A small request of a domain."""
    if domain in ("vision", "speech"):
        suffix, name = {"vision": ("*.png", "images"), "speech": ("*.flac", "recordings")}[domain]
        file = min((folder / DOMAINS[domain].input).rglob(suffix))
        return {name: [{"id": "first", "data": base64.b64encode(file.read_bytes()).decode()}]}
    if domain == "graph":
        return {"smiles": MOLECULES}
    lines = (folder / DOMAINS[domain].input).read_text().splitlines()
    return {"csv": "\n".join(lines[:400]) + "\n"}


@each_domain
def test_serve(trained: Shell, domain: str) -> None:
    """Start, be ready, answer, stop."""
    log = (trained.folder / "serve.txt").open("w+")
    server = subprocess.Popen(
        [trained.script, "serve", "one=run/model", "--port", "0"],
        cwd=trained.folder, env=trained.environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        address = None
        for _ in range(600):
            found = re.search(r"http://127\.0\.0\.1:\d+", (trained.folder / "serve.txt").read_text())
            if found and _answers(f"{found[0]}/readyz"):
                address = found[0]
                break
            assert server.poll() is None, (trained.folder / "serve.txt").read_text()
            time.sleep(1)
        assert address is not None
        asked = urllib.request.Request(
            f"{address}/v1/models/one/predict",
            json.dumps(question(domain, trained.folder)).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            assert json.load(answer)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        log.close()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("domain", "tool"), [(name, tool) for name, about in DOMAINS.items() for tool in about.tools]
)
def test_tools(trained: Shell, domain: str, tool: tuple[str, ...]) -> None:
    said = trained(domain, *tool)
    assert DOMAINS[domain].tools[tool] in said, said
    for place in [tool[i + 1] for i, word in enumerate(tool) if word == "-o"]:
        assert (trained.folder / place).exists()


def test_push_pull_and_verify(shell: Callable[[str], Shell], fake_hub: Any) -> None:
    """What one user publishes another one pulls, from a hub on loopback."""
    here = shell("timeseries")
    if not (here.folder / "run/model").exists():
        here("timeseries", "fit", "--config", "itransformer_etth1_96", *SMALL)
    hub = {"HF_ENDPOINT": fake_hub.address, "HF_TOKEN": fake_hub.token, "HF_HUB_DISABLE_XET": "1"}
    assert "me/new" in here("models", "push", "run/model", "me/new", **hub)
    assert "pulled" in here("models", "pull", "me/new", "-o", "pulled", **hub)
    assert (here.folder / "pulled/config.json").is_file()
    assert "pulled" in here("models", "verify", "pulled")
    assert "models" in here("models", "pull", "me/new", "--quiet", HF_HUB_OFFLINE="1", **hub)
    assert "me/other" in here("models", "pull", "me/other", code=2, **hub)


def test_light_commands(shell: Callable[[str], Shell]) -> None:
    here = shell("light")
    said = here("--help")
    for command in (
        "quickstart",
        "predict",
        "jobs",
        "models",
        "data",
        "serve",
        "export",
        "completion",
        "doctor",
    ):
        assert re.search(rf"^  {command} ", said, re.MULTILINE)
        assert here(command, "--help").startswith(f"usage: manyheads {command}")
    assert re.fullmatch(r"manyheads \d+\.\d+\S*\n", here("--version"))
    assert "etth1" in here("data", "list", "--domain", "timeseries")
    assert Path(here("data", "get", "etth1").strip()).name.startswith("ETTh1.csv")
    assert len(json.loads(here("models", "list", "--json"))) > 300
    assert "complete -o default" in here("completion", "bash")
    assert "fit" in here("completion", "words", "--", "graph", "f").split()
    assert "onnx" in here("export", "--list")
    doctor = here("doctor", HF_HUB_OFFLINE="1")
    assert re.search(r"^  torch +\d", doctor, re.MULTILINE)
    assert "ops on " in doctor
    for name, about in DOMAINS.items():
        assert here(name, "--help").startswith(f"usage: manyheads {name}")
        assert f"usage: manyheads {name} fit" in here(name, "fit", "--help")
        assert "did you mean" in here(name, "fit", "--config", about.config, "--model.nam", "x", code=2)


@each_domain
def test_quickstart(shell: Callable[[str], Shell], domain: str) -> None:
    here = shell("tours")
    said = here(
        "quickstart", domain, "-o", domain, "--epochs", "1", MANYHEADS_CACHE=str(here.folder / "cache")
    )
    assert "next:" in said
    assert json.loads((here.folder / domain / "metrics.json").read_text())
