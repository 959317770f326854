"""The tours: their tables, what they write for the job, what must be beaten, and each as a whole."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from manyheads.apps import checking, cli, options, quickstart, tour_pieces
from manyheads.apps.tours import TOURS
from manyheads.core import datasets
from manyheads.core.catalog import DOMAINS
from manyheads.core.errors import DataError, UsageError

needs_data = pytest.mark.skipif("MANYHEADS_DATA" not in os.environ, reason="MANYHEADS_DATA names no folder")
SCRIPT = Path(sys.executable).parent / "manyheads"


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_tour_names_what_there_is(domain: str) -> None:
    tour = TOURS[domain]
    assert tour.config in options.configs(domain)
    assert datasets.find(tour.dataset).domain == domain
    assert callable(getattr(tour_pieces, tour.source))
    assert callable(getattr(tour_pieces, tour.baselines))
    assert all(len(figures) == len(tour.figures) for figures in tour.beside.values())
    checking.check(domain, ["fit", "--config", tour.config, *tour.options])
    for command in tour.next:
        program, name, action, *rest = shlex.split(command.format("out"), comments=True)
        assert program == "manyheads"
        assert name in cli.COMMANDS
        if name in DOMAINS:
            checking.check(name, [action, *rest])


@pytest.mark.parametrize("domain", ["graph", "recsys", "speech"])
def test_data_that_are_not_here(
    domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MANYHEADS_DATA", raising=False)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart", domain]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"data set '{TOURS[domain].dataset}' has no address" in said
    assert "set MANYHEADS_DATA to that folder" in said
    assert "`manyheads quickstart` without a domain needs nothing" in said
    assert not list(tmp_path.iterdir())


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYHEADS_DATA", raising=False)
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path))

    def refused(*_: object) -> Path:
        raise DataError("data set 'fashion_mnist' could not be downloaded (no route to host)")

    monkeypatch.setattr(datasets, "download", refused)
    with pytest.raises(UsageError, match=r"quickstart vision: .*no route to host.*without a domain needs"):
        quickstart.find_data("vision", TOURS["vision"])


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    assert cli.main(["quickstart", "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_history(tmp_path: Path) -> None:
    written = pd.read_csv(tour_pieces.history(tmp_path))
    assert len(written) == 17420 - tour_pieces.AHEAD
    assert list(written.columns)[::7] == ["date", "OT"]


@needs_data
def test_photos_and_their_nearest(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    names = [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    (tmp_path / "model/config.json").write_text(json.dumps({"labels": names}))
    written = sorted(path.name for path in tour_pieces.photos(tmp_path).iterdir())
    assert written[0] == "00_ankle-boot.png"
    assert len(written) == tour_pieces.SHOWN
    ((share,),) = tour_pieces.nearest_images(tmp_path, 0).values()
    assert share == pytest.approx(0.815, abs=0.02)  # 0.85 with all 60,000


@needs_data
def test_recordings_and_constant_answers(tmp_path: Path) -> None:
    table = pd.read_csv(tour_pieces.recordings(tmp_path), dtype=str)
    assert len(table) == tour_pieces.SHOWN
    assert (tmp_path / "recordings" / table["audio"][0]).is_file()
    pd.DataFrame({"reference": ["33", "35", "33"]}).to_csv(tmp_path / "texts.csv")
    assert tour_pieces.constant_answer(tmp_path, 0) == {"always '33'": (1 / 6,)}


@needs_data
def test_papers_and_what_needs_no_words(tmp_path: Path) -> None:
    folder = tour_pieces.papers(tmp_path)
    nodes, edges = (pd.read_parquet(folder / f"{name}.parquet") for name in ("nodes", "edges"))
    assert (len(nodes), len(nodes["x"][0]), len(edges)) == (2708, 1433, 5278)
    assert not edges.duplicated().any()
    figures = tour_pieces.labels_and_citations(tmp_path, 0)
    assert figures["the most frequent class"] == (0.319,)
    assert 0.65 < figures["labels spread along citations"][0] < 0.75


@needs_data
def test_log_and_popularity(tmp_path: Path) -> None:
    table = pd.read_csv(tour_pieces.log(tmp_path))
    assert table.shape == (100_000, 3)
    figures = {
        f"test_popularity_{name}@10": value for name, value in (("ndcg", 1), ("hr", 2), ("coverage", 3))
    }
    (tmp_path / "test.json").write_text(json.dumps(figures))
    assert list(tour_pieces.popularity(tmp_path, 0).values()) == [(1, 2, 3)]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_tour(domain: str, tmp_path: Path) -> None:
    """Beats its baselines in 360 s of CPU time at most: `pytest -m slow tests/apps/test_quickstart.py`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [SCRIPT, "quickstart", domain, "-o", "tour"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2 * 180
    tour, output = TOURS[domain], tmp_path / "tour"
    for name in (*tour.pictures, f"{tour.job}/_SUCCESS", "model/config.json", "metrics.json"):
        assert (output / name).exists(), name
    mine, *others = json.loads((output / "metrics.json").read_text()).values()
    baselines = others[len(tour.beside) :]
    assert baselines
    heading = next(iter(tour.figures))
    better = np.less if heading in ("MSE", "CER") else np.greater
    if domain != "timeseries":  # DLinear is as good on ETTh1
        assert all(better(mine[heading], figures[heading]) for figures in baselines)
    print(done.stdout)
