"""The server under load, and under attack: python -m benchmarks.serving [--seconds 60] [--output FOLDER].

A classifier of 224 x 224 images is served by one worker with one thread. Honest clients, in a process of
their own beside the server, send photos one after the other, come back after `Retry-After` where they are
turned away, and note each answer. The same model's batch job over the same photos, with one thread too, is
what the throughput is compared with. Then all again while hostile requests come from eight sides
(`serving_hostile`), slow ones are held open, and small models of the other domains are served beside. At last
each hostile request alone, with its answer. It takes about 2 x SECONDS and three minutes. With --output
the tables are written to `serving.md` and `serving.json` there; ours are in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from benchmarks import serving_hostile as hostile
from benchmarks.serving_load import DEADLINE, ENVIRONMENT, Attack, Watch, honest, send, served

ROOT = Path(__file__).parents[1]
MODEL = "vit_tiny_patch16_224"


def helpers() -> ModuleType:
    """The tests' small models."""
    path = ROOT / "tests" / "apps" / "serving_tools.py"
    spec = importlib.util.spec_from_file_location("serving_tools", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_tools"] = module
    spec.loader.exec_module(module)
    return module


def make_models(folder: Path) -> dict[str, Path]:
    """The classifier, and small models of the other domains."""
    from manyheads.vision.preprocessing import Preprocessing

    tools = helpers()
    found = {
        "vision": tools.save(
            folder / "vision", "vision", MODEL, {"num_classes": 1000}, Preprocessing().to_json(),
            labels=[f"class {i}" for i in range(1000)],
        )
    }  # fmt: skip
    (folder / "series").mkdir()
    found["timeseries"] = tools.series_model(folder / "series")[0]
    found["speech"] = tools.recognition_model(folder / "speech")
    found["graph"] = tools.graph_model(folder / "graph")
    found["recsys"] = tools.recsys_model(folder / "recsys")
    return found


def make_photos(folder: Path, count: int) -> list[bytes]:
    """Photos of a camera's kind: JPEG of 500 x 375, some 40 KB each."""
    folder.mkdir()
    found = []
    rows, columns = np.mgrid[0:375, 0:500]
    for i in range(count):
        rng = np.random.default_rng(i)
        waves = [np.sin(rows / rng.uniform(3, 60) + columns / rng.uniform(3, 60)) for _ in range(3)]
        pixels = 127 + 80 * np.stack(waves, axis=2) + rng.normal(0, 10, (375, 500, 3))
        content = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=85)
        (folder / f"{i:04d}.jpg").write_bytes(content.getvalue())
        found.append(content.getvalue())
    return found


def batch_rate(model: Path, photos: Path, output: Path, count: int) -> tuple[float, float]:
    """Photos a second, and a CPU second, of the batch job, without what it takes to start."""
    found = []
    for number, inputs in enumerate((sorted(photos.iterdir())[: count // 4], sorted(photos.iterdir()))):
        command = [sys.executable, "-m", "manyheads.apps.cli", "predict", str(model), *map(str, inputs)]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([*command, "-o", str(output / f"out{number}"), "--quiet"], env=ENVIRONMENT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((len(inputs), time.perf_counter() - begin, cpu))
    (few_count, few_s, few_cpu), (all_count, all_s, all_cpu) = found
    more = all_count - few_count
    return more / (all_s - few_s), more / (all_cpu - few_cpu)


@dataclass
class Row:
    """A line of the load table."""

    case: str
    clients: int
    seconds: float
    answers: int
    per_second: float
    of_batch: float
    of_batch_cpu: float
    p50: float
    p99: float
    statuses: dict[str, int]
    memory_before: float
    memory_after: float
    hostile: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)


def measure(
    case: str, models: dict[str, Path], photos: Sequence[bytes], options: argparse.Namespace,
    batch: tuple[float, float], attacked: bool,
) -> Row:  # fmt: skip
    """Serve, and let clients ask."""
    with served(models) as (url, pid):
        honest(url, photos, 32, 3)  # the first requests: batches of all sizes
        attack = Attack(url)
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(Watch(pid))
            if attacked:
                stack.enter_context(attack)
            load = honest(url, photos, options.clients, options.seconds)
        ready = httpx.get(f"{url}/readyz").status_code
        assert ready == 200, "a worker does not answer any more"
    before, after = watch.grown()
    return Row(
        case=case,
        clients=options.clients,
        seconds=load.ended - load.began,
        answers=len(load.seconds),
        per_second=load.rate,
        of_batch=load.rate / batch[0],
        of_batch_cpu=len(load.seconds) / watch.cpu / batch[1],
        p50=load.quantile(0.5),
        p99=load.quantile(0.99),
        statuses=dict(sorted(load.statuses.items())),
        memory_before=before,
        memory_after=after,
        hostile=dict(sorted(attack.sent.items())),
        wrong=dict(attack.wrong),
    )


def one_by_one(models: dict[str, Path]) -> list[dict[str, Any]]:
    """Each hostile request alone."""
    found = []
    with served(models) as (url, _), httpx.Client(base_url=url, timeout=DEADLINE + 20) as client:
        for request in hostile.requests():
            begin = time.perf_counter()
            status = send(client, request)
            seconds = time.perf_counter() - begin
            right = status in request.statuses
            found.append(_single(request.name, status, list(request.statuses), seconds, right))
        address = urlsplit(url)
        for name, talk in hostile.raw().items():
            begin = time.perf_counter()
            answer = talk(str(address.hostname), address.port or 80)
            status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "closed"
            seconds = time.perf_counter() - begin
            right = status == "closed" or status.startswith("4")
            found.append(_single(name, status, ["4xx", "closed"], seconds, right))
        assert client.get("/readyz").status_code == 200
    return found


def _single(name: str, answer: object, allowed: list[Any], seconds: float, right: bool) -> dict[str, Any]:
    return {"request": name, "answer": answer, "allowed": allowed, "seconds": seconds, "right": right}


def as_text(batch: tuple[float, float], rows: Sequence[Row], single: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = [
        "# The server under load\n",
        f"{MODEL}, one worker with one thread, deadline {DEADLINE} s. The batch job over the same photos:"
        f" {batch[0]:.1f} a second, {batch[1]:.1f} a CPU second.\n",
        "| | clients | s | answers | a second | of the batch job | of it by CPU | p50 s | p99 s | statuses"
        " | memory MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        statuses = ", ".join(f"{key}: {value}" for key, value in row.statuses.items())
        lines.append(
            f"| {row.case} | {row.clients} | {row.seconds:.0f} | {row.answers} | {row.per_second:.1f}"
            f" | {row.of_batch:.2f} | {row.of_batch_cpu:.2f} | {row.p50:.1f} | {row.p99:.1f} | {statuses}"
            f" | {row.memory_before:.0f} -> {row.memory_after:.0f} |"
        )
    for row in rows:
        if row.hostile:
            statuses = ", ".join(f"{key}: {value}" for key, value in row.hostile.items())
            wrong = ", ".join(f"{key} ({value})" for key, value in row.wrong.items()) or "none"
            lines.append(f"\nHostile answers meanwhile: {statuses}; not allowed: {wrong}.")
    if single:
        lines += [
            "\n## Hostile requests, one by one\n",
            "| request | answer | allowed | s |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {each['request']} | {each['answer']}{'' if each['right'] else ' **wrong**'}"
            f" | {', '.join(map(str, each['allowed']))} | {each['seconds']:.2f} |"
            for each in single
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each load (60)")
    parser.add_argument("--clients", type=int, default=300, help="honest ones (300)")
    parser.add_argument("--photos", type=int, default=512, help="of the batch job (512)")
    parser.add_argument("--only", choices=("load", "hostile"), help="one of the two")
    parser.add_argument("--output", type=Path, help="folder for the tables")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        models, photos = make_models(folder), make_photos(folder / "photos", options.photos)
        batch, rows, single = (float("nan"), float("nan")), [], []
        if options.only != "hostile":
            batch = batch_rate(models["vision"], folder / "photos", folder / "job", options.photos)
            print(f"batch job: {batch[0]:.1f} photos/s, {batch[1]:.1f} a CPU second", flush=True)
            alone = {"vision": models["vision"]}
            rows.append(measure("honest clients", alone, photos, options, batch, attacked=False))
            print(as_text(batch, rows, []), flush=True)
            rows.append(measure("with hostile ones", models, photos, options, batch, attacked=True))
        if options.only != "load":
            single = one_by_one(models)
    text = as_text(batch, rows, single)
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "serving.md").write_text(text)
        found = {"batch": batch, "load": [asdict(row) for row in rows], "hostile": single}
        (options.output / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    bad = [row for row in rows if set(row.statuses) - {"200", "429"} or row.p99 > DEADLINE or row.wrong]
    return 1 if bad or not all(each["right"] for each in single) else 0


if __name__ == "__main__":
    sys.exit(main())
