"""All domains by one code path: the same bytes on every engine and file system, killed at every point.

`pytest -m slow tests/apps/test_jobs_domains.py` kills processes with real models, and runs them on Ray.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from manyheads.apps import locks
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core import hub
from manyheads.core.catalog import create_model

SCRIPT = Path(__file__).with_name("real_job.py")
DOMAINS = ("vision", "timeseries", "recognition", "separation", "graph", "recsys")


@dataclass(frozen=True)
class Made:
    """A tiny model, something to run it over in several shards, and what it gives undisturbed."""

    model: str
    inputs: list[str]
    shard_size: int
    settings: dict[str, str | int] = field(default_factory=dict)
    finishes: bool = False  # it makes something of all parts together

    def options(self, output, **changes):
        known = JobOptions(
            self.model, self.inputs, output, shard_size=self.shard_size, max_bad=1.0, quiet=True,
            settings=self.settings,
        )  # fmt: skip
        return replace(known, **changes)


def save(folder, domain, name, preprocessing, arguments, **more):
    torch.manual_seed(0)
    model = create_model(name, **arguments)
    for weight in model.parameters():
        if weight.ndim > 1:  # so that different inputs give different rows
            torch.nn.init.normal_(weight, std=2 * weight[0].numel() ** -0.5)
    about = {"domain": domain, "name": name, "arguments": arguments, "preprocessing": preprocessing}
    hub.save(folder / "model", model, **about, **more)
    (folder / "in").mkdir()
    return str(folder / "model"), folder / "in"


def vision(folder):
    from manyheads.vision.preprocessing import Preprocessing

    labels = [f"class {i}" for i in range(7)]
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": len(labels)}
    model, given = save(folder, "vision", "cct", Preprocessing((32, 32)).to_json(), sizes, labels=labels)
    rng = np.random.default_rng(0)
    for i in range(14):
        pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG")
        (given / f"{i:02d}.jpg").write_bytes(content.getvalue()[: -900 if i == 5 else None])
    return Made(model, [str(given)], 4)


def timeseries(folder):
    from manyheads.timeseries.data import ForecastData

    def write(path, series, rows):
        ids = np.repeat([f"s{i:02d}" for i in range(series)], rows)
        times = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.tile(np.arange(rows), series), "h")
        y = 10 + np.sin(np.arange(series * rows) / 4) + np.random.default_rng(0).normal(size=series * rows)
        pd.DataFrame({"unique_id": ids, "ds": times, "y": y}).to_csv(path, index=False)
        return str(path)

    data = ForecastData(write(folder / "train.csv", 3, 300), seq_len=24, pred_len=12)
    data.setup()
    sizes = {"seq_len": 24, "pred_len": 12}
    model, given = save(folder, "timeseries", "dlinear", data.preprocessing(), sizes)
    path = given / "series.csv"
    write(path, 14, 40)
    with path.open("a") as file:
        file.write("short,2020-01-01 00:00:00,1.0\n")
    return Made(model, [str(path)], 4)


def sounds(folder, seconds):
    rng = np.random.default_rng(0)
    for i, length in enumerate(seconds):
        soundfile.write(folder / f"{i:02d}.wav", rng.normal(size=round(8000 * length)) / 10, 8000)
    (folder / "99.wav").write_text("no sound")


def recognition(folder):
    from manyheads.speech.recognition.preprocessing import Features, Preprocessing
    from manyheads.speech.vocabulary import FIRST, Characters

    names = (*FIRST, *"0123456789")
    sizes = {
        "vocab_size": len(names), "input_size": 140, "dim": 32, "heads": 2, "units": 64,
        "encoder_blocks": 2, "decoder_blocks": 2,
    }  # fmt: skip
    cmvn = torch.tensor([[-15.0], [0.3]]).expand(2, 140)
    preprocessing = Preprocessing.of(8000, Features(mels=20), cmvn, Characters(names)).to_json()
    model, given = save(folder, "speech", "paraformer", preprocessing, sizes)
    sounds(given, [1.0, 2.5, 0.6, 1.4, 3.0, 0.8, 1.1])
    return Made(model, [str(given)], 2, {"vad": "none", "subtitles": "both"}, finishes=True)


def separation(folder):
    sizes = {"num_spks": 2, "dim": 16, "depth": 1, "query_key_dim": 16}
    model, given = save(folder, "speech", "mossformer", {"sample_rate": 8000}, sizes)
    sounds(given, [1.5, 9.0, 0.7, 2.0])
    settings = {"chunk_seconds": 2, "overlap_seconds": 1, "span_seconds": 4}
    return Made(model, [str(given)], 1, settings, finishes=True)


def graph(folder):
    pytest.importorskip("rdkit", reason="rdkit is not installed")
    from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

    target = Target("regression", ("logp",), None, (1.5,), (2.0,))
    about = Preprocessing(features="zinc", encoding=Encoding("laplacian", 4), target=target)
    sizes = {**about.model_inputs(), "hidden_dim": 16, "L": 2}
    model, given = save(folder, "graph", "graph_transformer", about.to_json(), sizes)
    smiles = [
        "CCO",
        "c1ccccc1",
        "CC(=O)O",
        "CCN(CC)CC",
        "C1CCCCC1",
        "CC(=O",
        "CCCl",
        "c1ccncc1",
        "CCOC(C)=O",
        "NCC",
    ]
    table = pd.DataFrame({"id": [f"m{i}" for i in range(len(smiles))], "smiles": smiles})
    table.to_csv(given / "molecules.csv", index=False)
    return Made(model, [str(given / "molecules.csv")], 3)


def recsys(folder):
    from manyheads.recsys.logs import Columns
    from manyheads.recsys.preprocessing import Preprocessing
    from manyheads.recsys.vocabulary import Vocabulary

    sizes = {"num_items": 60, "max_len": 10, "hidden_size": 16}
    kept = Preprocessing(Columns(), Vocabulary(map(str, range(60))), np.arange(60))
    model, given = save(folder, "recsys", "sasrec", kept.to_json(), sizes)
    rng = np.random.default_rng(0)
    size = 20 * 12
    columns = {
        "user_id": rng.permutation(np.repeat(np.arange(20), 12)),
        "item_id": rng.integers(0, 60, size),
        "timestamp": rng.integers(0, 10**9, size),
    }
    pd.DataFrame(columns).to_parquet(given / "log.parquet")
    return Made(model, [str(given / "log.parquet")], 6)


MAKERS = {make.__name__: make for make in (vision, timeseries, recognition, separation, graph, recsys)}


@pytest.fixture(scope="module", params=DOMAINS)
def made(request, tmp_path_factory):
    """A domain's model and input."""
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """The files of a job in this process that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = run_job(made.options(out))
    assert (result.exit_code, result.bad > 0) == (0, "recsys" not in made.model)
    assert result.shards >= 3 and result.rows > 3
    found = files(out)
    assert any(name.startswith("results/") for name in found) == made.finishes
    return found


class Killed(BaseException):
    """Ends a job at a point of the protocol."""


def points(made, shards):
    """Points of the protocol, with the shard."""
    found = [("written", 1), ("bad", 1), ("part", shards - 1), ("success", shards)]
    return [*found, ("finishing", 1), ("finished", shards), ("results", shards)] if made.finishes else found


def test_ended_at_every_point_after_another(made, undisturbed, tmp_path):
    shards = json.loads(undisturbed["job.json"])["shards"]
    out = tmp_path / "out"
    for wanted in points(made, shards):

        def hook(point, index, wanted=wanted):
            if (point, index) == wanted:
                raise Killed

        with pytest.raises(Killed):
            run_job(made.options(out, resume=True), fault=hook)
        assert not (out / "_SUCCESS").exists()
    assert run_job(made.options(out, resume=True)).exit_code == 0
    assert files(out) == undisturbed


def test_from_and_to_another_file_system(made, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    memory = fsspec.filesystem("memory")
    empty(memory)
    given = Path(made.inputs[0])
    for path in given.rglob("*") if given.is_dir() else [given]:
        memory.pipe_file(f"/bucket{path}", path.read_bytes())
    result = run_job(made.options("memory://bucket/out", inputs=[f"memory://bucket{given}"]))
    assert result.exit_code == 0
    found = {
        posixpath.relpath(path, "/bucket/out"): memory.cat_file(path) for path in memory.find("/bucket/out")
    }
    renamed = [name for name, content in undisturbed.items() if "bad-" in name and bytes(given) in content]
    for name in renamed:  # reasons that name the input name its address; the part has the hash of them
        told = undisturbed[name].replace(bytes(given), f"memory://bucket{given}".encode())
        assert found.pop(name) == told
        part = next(each for each in found if each.startswith(name.replace("bad-", "part-")[:10]))
        assert pq.read_table(io.BytesIO(found.pop(part))).equals(pq.read_table(io.BytesIO(undisturbed[part])))
        found.pop("_SUCCESS")
    assert found.items() <= undisturbed.items()
    assert len(found) == len(undisturbed) - 3 * len(renamed)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    empty(memory)


def empty(memory):
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


# With real processes.


def start(made, out, **options):
    """Run a job in a process of one thread; its exit code and errors."""
    known = {
        "model": made.model, "inputs": made.inputs, "output": str(out), "shard_size": made.shard_size,
        "max_bad": 1.0, "quiet": True, "settings": made.settings,
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps({**known, **options})],
        capture_output=True, text=True, timeout=1200, check=False,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def of_one_thread(made, tmp_path_factory):
    """The files of a job in a process of one thread."""
    out = tmp_path_factory.mktemp("one") / "out"
    code, err = start(made, out)
    assert code == 0, err
    return files(out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_processes(made, of_one_thread, tmp_path, workers):
    out, shards = tmp_path / "out", json.loads(of_one_thread["job.json"])["shards"]
    killed = 0
    for number, fault in enumerate(points(made, shards)):
        if workers and (out / f"part-{fault[1]:05d}-of-{shards:05d}.parquet").exists():
            continue  # the other worker made it while its neighbour died
        marker = tmp_path / f"marker{number}"
        code, err = start(made, out, workers=workers, resume=True, fault=fault, marker=str(marker))
        assert marker.exists()
        died = 1 if workers and fault[0] in ("written", "bad", "part") else -signal.SIGKILL
        assert code == died, err
        killed += 1
    assert killed >= 2
    code, err = start(made, out, workers=workers, resume=True)
    assert code == 0, err
    assert files(out) == of_one_thread


@pytest.mark.slow
def test_on_ray_with_a_killed_worker(made, of_one_thread, tmp_path, cluster):
    out, marker = tmp_path / "out", tmp_path / "marker"
    ray = {"engine": "ray", "address": cluster, "workers": 2}
    code, err = start(made, out, **ray, fault=["written", 1], marker=str(marker))
    assert code == 0, err
    assert marker.exists()
    assert files(out) == of_one_thread
