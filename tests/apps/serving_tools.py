"""Tiny models of all domains with inputs for them, and servers in this process or another, for tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import soundfile
import torch
from PIL import Image

from manyheads.apps.serving import Options, run
from manyheads.apps.serving.process import InThread
from manyheads.core import hub
from manyheads.core.catalog import create_model

RATE = 8000


@dataclass(frozen=True)
class Case:
    """A model, and the same records for a job and for a request.

    Args:
        model: The folder.
        inputs: Of the job.
        request: Of httpx: `json`, `content` and `headers`, or `files`.
        results: The rows are in the job's results, not its parts.
        settings: Of job and request, where not the model's.
    """

    model: Path
    inputs: list[Path]
    request: dict[str, Any]
    results: str = ""
    settings: dict[str, str | int] = field(default_factory=dict)


def save(folder: Path, domain: str, name: str, arguments: dict[str, Any], preprocessing: Any, **more: Any):
    torch.manual_seed(0)
    model = create_model(name, **arguments)
    for weight in model.parameters():  # so large that different inputs give different rows
        if weight.ndim > 1 and domain == "speech" and name == "paraformer":
            torch.nn.init.normal_(weight, std=3 * weight[0].numel() ** -0.5)
    about = {"domain": domain, "name": name, "arguments": arguments, "preprocessing": preprocessing}
    hub.save(folder, model, **about, **more)
    return folder


def encoded(size: tuple[int, int], seed: int = 0, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((size[1] * 2, size[0] * 2)).save(out, kind)
    return out.getvalue()


def vision_model(folder: Path) -> Path:
    from manyheads.vision.preprocessing import Preprocessing

    return save(
        folder, "vision", "cct_2_3x2_32", {"num_classes": 7, "img_size": 32},
        Preprocessing(size=(32, 32)).to_json(), labels=[f"class {i}" for i in range(7)],
    )  # fmt: skip


def vision(folder: Path) -> Case:
    source = folder / "images"
    source.mkdir()
    for i in range(5):
        (source / f"image {i}.jpg").write_bytes(encoded((20 + 7 * i, 30), i))
    files = [("file", (path.name, path.read_bytes())) for path in sorted(source.iterdir())]
    return Case(vision_model(folder / "model"), [source], {"files": files})


def vision_json(folder: Path) -> Case:
    case = vision(folder)
    images = [
        {"id": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
        for path in sorted(case.inputs[0].iterdir())
    ]
    settings: dict[str, Any] = {"output_kind": "features"}
    request = {"json": {"images": images, "settings": settings}}
    return Case(case.model, case.inputs, request, settings=settings)


def series_model(folder: Path) -> tuple[Path, Path]:
    from manyheads.timeseries.data import ForecastData

    hours, waves = pd.date_range("2020-01-01", periods=300, freq="h"), np.arange(300)
    rng = np.random.default_rng(0)
    frame = pd.concat(
        pd.DataFrame({"unique_id": f"s{i}", "ds": hours, "y": np.sin(waves / (i + 2)) + rng.normal(size=300)})
        for i in range(4)
    )
    table = folder / "series.csv"
    frame.to_csv(table, index=False)
    data = ForecastData(str(table), seq_len=48, pred_len=12)
    data.setup()
    arguments = {"seq_len": 48, "pred_len": 12, "d_model": 16, "n_heads": 2, "e_layers": 1, "d_ff": 16}
    return save(folder / "model", "timeseries", "patchtst", arguments, data.preprocessing()), table


def timeseries(folder: Path) -> Case:
    model, table = series_model(folder)
    return Case(model, [table], {"content": table.read_bytes(), "headers": {"content-type": "text/csv"}})


def timeseries_rows(folder: Path) -> Case:
    model, table = series_model(folder)
    return Case(model, [table], {"json": {"rows": pd.read_csv(table).to_dict("records")}})


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=int(seconds * RATE)) * 0.1
    return (noise * (0.6 + 0.4 * np.sin(np.arange(len(noise)) / RATE * 20))).astype(np.float32)


def recordings(folder: Path, seconds: tuple[float, ...]) -> tuple[Path, dict[str, Any]]:
    source = folder / "recordings"
    source.mkdir()
    for i, each in enumerate(seconds):
        soundfile.write(source / f"talk{i}.wav", sound(each, i), RATE)
    files = [("file", (path.name, path.read_bytes())) for path in sorted(source.iterdir())]
    return source, {"files": files}


def recognition_model(folder: Path, streaming: bool = False) -> Path:
    from manyheads.speech.recognition.preprocessing import Features, Preprocessing
    from manyheads.speech.vocabulary import FIRST, Characters

    names = (*FIRST, *"0123456789")
    arguments = {
        "vocab_size": len(names), "input_size": 140, "dim": 32, "heads": 2, "units": 64,
        "encoder_blocks": 2, "decoder_blocks": 2, "streaming": streaming,
    }  # fmt: skip
    cmvn = torch.tensor([[-15.0], [0.3]]).expand(2, 140)
    of = Preprocessing.of(RATE, Features(mels=20), cmvn, Characters(names))
    return save(folder, "speech", "paraformer", arguments, of.to_json())


def recognition(folder: Path) -> Case:
    source, request = recordings(folder, (3.0, 40.0, 1.2))
    settings: dict[str, Any] = {"vad": "energy", "segment_seconds": 10}
    request["data"] = {"settings": '{"vad": "energy", "segment_seconds": 10}'}
    return Case(recognition_model(folder / "model"), [source], request, settings=settings)


def separation(folder: Path) -> Case:
    arguments = {"num_spks": 2, "dim": 16, "depth": 1, "query_key_dim": 16}
    model = save(folder / "model", "speech", "mossformer", arguments, {"sample_rate": RATE})
    source, request = recordings(folder, (7.0, 1.5))
    settings = {"chunk_seconds": 2, "overlap_seconds": 1, "span_seconds": 6}
    request["data"] = {"settings": '{"chunk_seconds": 2, "overlap_seconds": 1, "span_seconds": 6}'}
    return Case(model, [source], request, "speakers.parquet", settings)


def graph_model(folder: Path) -> Path:
    from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

    target = Target("regression", ("logp",), None, (1.5,), (2.0,))
    of = Preprocessing(features="zinc", encoding=Encoding("laplacian", 8), target=target)
    arguments = {**of.model_inputs(), "hidden_dim": 16, "L": 2}
    return save(folder, "graph", "graph_transformer", arguments, of.to_json())


SMILES = ["CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"]


def graph(folder: Path) -> Case:
    ids = [f"m{i}" for i in range(len(SMILES))]
    table = folder / "molecules.csv"
    pd.DataFrame({"id": ids, "smiles": SMILES}).to_csv(table, index=False)
    return Case(graph_model(folder / "model"), [table], {"json": {"smiles": SMILES, "ids": ids}})


def graph_tables(folder: Path) -> Case:
    from manyheads.graph.columns import Column
    from manyheads.graph.preprocessing import Encoding, Preprocessing, Target

    of = Preprocessing(
        "tables",
        node_columns=(Column("f", None, (0.0,) * 2, (1.0,) * 2, 2),),
        encoding=Encoding("degree", 8),
        level="node",
        target=Target("classification", ("topic",), ("a", "b")),
    )
    arguments = {**of.model_inputs(), "hidden_dim": 16, "L": 2, "readout": "node"}
    model = save(folder / "model", "graph", "graph_transformer", arguments, of.to_json())
    source = folder / "graph"
    source.mkdir()
    rng = np.random.default_rng(0)
    nodes = pd.DataFrame(rng.normal(size=(9, 2)).round(3), columns=["f_0", "f_1"])
    nodes.insert(0, "id", [f"n{i}" for i in range(9)])
    edges = pd.DataFrame({"source": [f"n{i}" for i in range(8)], "target": [f"n{i + 1}" for i in range(8)]})
    nodes.to_csv(source / "nodes.csv", index=False)
    edges.to_csv(source / "edges.csv", index=False)
    request = {"nodes": nodes.to_dict("records"), "edges": edges.to_dict("records")}
    return Case(model, [source], {"json": request})


def recsys_model(folder: Path) -> Path:
    from manyheads.recsys.logs import Columns
    from manyheads.recsys.preprocessing import Preprocessing
    from manyheads.recsys.vocabulary import Vocabulary

    kept = Preprocessing(Columns("user", "movie", "when"), Vocabulary(map(str, range(40))), np.arange(40))
    arguments = {"num_items": 40, "max_len": 10, "hidden_size": 16}
    return save(folder, "recsys", "sasrec", arguments, kept.to_json())


def recsys(folder: Path) -> Case:
    rng = np.random.default_rng(0)
    log = pd.DataFrame(
        {
            "user": [f"u{i}" for i in rng.integers(0, 6, 50)],
            "movie": rng.integers(0, 40, 50),
            "when": range(50),
        }
    )
    table = folder / "log.csv"
    log.to_csv(table, index=False)
    rows = log.rename(columns={"user": "user_id", "movie": "item_id", "when": "timestamp"}).to_dict("records")
    settings: dict[str, Any] = {"top_k": 5}
    request = {"json": {"interactions": rows, "settings": settings}}
    return Case(recsys_model(folder / "model"), [table], request, settings=settings)


CASES = {
    each.__name__: each
    for each in (
        vision, vision_json, timeseries, timeseries_rows, recognition, separation, graph, graph_tables, recsys
    )
}  # fmt: skip


class Local:
    """A server in a thread of this process, its workers in threads: fast to start.

    Args:
        models: Name and folder of each.
        options: Of the server.
    """

    def __init__(self, models: dict[str, Path], **options: Any) -> None:
        references = tuple(f"{name}={folder}" for name, folder in models.items())
        self.options = Options(references, port=0, device="cpu", **options)
        self._outcome: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Local:
        self._thread.start()
        first = self._outcome.get(timeout=60)
        if isinstance(first, BaseException):
            raise first
        self.url = f"http://127.0.0.1:{first}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        end = time.monotonic() + 60
        while self.client.get("/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.stop()
        self.code = self._outcome.get(timeout=60)
        self._thread.join(60)
        if isinstance(self.code, BaseException):
            raise self.code

    def stop(self, signum: int = signal.SIGTERM) -> None:
        self.loop.call_soon_threadsafe(self.run.stop, signum)

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._outcome.put(error)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        served = run.find(self.options.models)
        self.service = run.make_service(self.options, served, InThread)
        self.guard = guard = run.make_guarded(self.options, self.service)
        with contextlib.closing(run.bind("127.0.0.1", 0)) as listening:
            self.run = run.Run(self.options, self.service, guard, listening)
            self._outcome.put(listening.getsockname()[1])
            self._outcome.put(await self.run.serve())

    def predict(self, name: str, **request: Any) -> httpx.Response:
        return self.client.post(f"/v1/models/{name}/predict", **request)


class Command:
    """`manyheads serve` as a process."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        known = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [sys.executable, "-m", "manyheads.apps.cli", "serve", *map(str, arguments), "--port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env={**known, **environment}, **pipes)
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Command:
        assert self.process.stdout is not None
        self._reader.start()
        self.first = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", self.first)
        if found is None:
            self.process.wait(60)
            raise AssertionError(f"no server: {self.first}{''.join(self.errors)}")
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def __exit__(self, *error: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            finally:
                self.process.kill()
        self._reader.join(10)

    def predict(self, name: str, **request: Any) -> httpx.Response:
        return self.client.post(f"/v1/models/{name}/predict", **request)
