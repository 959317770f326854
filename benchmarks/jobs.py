"""Throughput of batch jobs by engine, against a plain loop with the same model: python -m benchmarks jobs.

Photographs of 1600 x 1200 into a small model at 224 pixels: decoding is most of the work. The loop is what
one would write oneself: read, decode, resize, stack, predict, one table at the end; it has no bad records, no
parts, no fingerprint, and starts again from nothing. Each runs in a process of its own with one thread a
process, in turn, several times; a round compares photographs a second once a model is loaded and a first
worker ready. What comes before that is the start-up, which is printed beside. It needs a quiet machine of two
cores or more, and takes about five minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Note, missing

ROUNDS = 3
MODEL = "vit_tiny_patch16_224"  # of two blocks, and patches of 32
PHOTOS, DIFFERENT, SIZE, SHARD, BATCH = 1920, 240, (1600, 1200), 48, 16
SHAPE = f"{PHOTOS} photos {SIZE[0]}x{SIZE[1]}"
LOOP = "plain loop"
# Options of `manyheads predict`, and the least share of the loop's photographs a second.
JOBS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "job in one process": ((), 0.95),
    "job with 2 workers": (("--workers", "2"), 1.6),
    "job on Ray, 2 workers": (("--engine", "ray", "--workers", "2"), None),
}


@dataclass(frozen=True)
class Run:
    """What a process did: photographs a second, seconds before the first, CPU seconds in all."""

    rate: float
    starting: float
    cpu: float


def cases(device: str) -> Iterator[Note]:
    """A line each: the loop, and the job by engine."""
    yield Note(LOOP, SHAPE, lambda seconds: (_figures(rounds(), LOOP), True))
    for name, (_, least) in JOBS.items():
        if "Ray" in name and find_spec("ray") is None:
            yield missing(name, SHAPE, "ray")
            continue
        yield Note(name, SHAPE, lambda seconds, name=name, least=least: _compare(rounds(), name, least))


def _figures(found: Sequence[dict[str, Run]], name: str) -> str:
    runs = [each[name] for each in found]
    values = [statistics.median(getattr(run, key) for run in runs) for key in ("rate", "starting", "cpu")]
    rate, starting, cpu = values
    return f"{rate:.1f} photos/s, start-up {starting:.1f} s, {cpu:.1f} s of CPU in all"


def _compare(found: Sequence[dict[str, Run]], name: str, least: float | None) -> tuple[str, bool]:
    ratios = [each[name].rate / each[LOOP].rate for each in found]
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    wanted = "" if least is None else f", at least {least}"
    return (
        f"{_figures(found, name)}; {ratio:.2f} of the loop ({spread}{wanted})",
        least is None or ratio >= least,
    )


@cache
def rounds() -> list[dict[str, Run]]:
    """Run all in turn, several times."""
    names = [LOOP, *(name for name in JOBS if "Ray" not in name or find_spec("ray") is not None)]
    with tempfile.TemporaryDirectory(prefix="mh-jobs-") as folder:
        place = Path(folder)
        write_photos(place / "photos")
        write_model(place / "model")
        for path in (place / "photos").iterdir():  # into the page cache
            path.read_bytes()
        return [
            {name: measure(name, place, f"{number}-{name}") for name in names} for number in range(ROUNDS)
        ]


def measure(name: str, place: Path, out: str) -> Run:
    """Run the loop or a job in a process of its own."""
    where = [str(place / "model"), str(place / "photos")]
    if name == LOOP:
        command = [sys.executable, "-m", "benchmarks.jobs", *where, str(place / f"{out}.parquet")]
    else:
        command = [sys.executable, "-m", "manyheads.apps.cli", "predict", *where, "-o", str(place / out)]
        command += ["--batch-size", str(BATCH), "--shard-size", str(SHARD), "--json", *JOBS[name][0]]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | threads
    before = os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["rows"] == PHOTOS
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(PHOTOS / (said["seconds"] - said["starting"]), said["starting"], cpu)


def write_photos(folder: Path) -> None:
    """Write photographs: real ones made larger, or waves and noise where there are none."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    data = Path(os.environ.get("MANYHEADS_DATA", "").split(os.pathsep)[0])
    real = sorted((data / "vision" / "imagenet_samples" / "images").glob("*.jpg"))
    rng = np.random.default_rng(0)
    for i in range(DIFFERENT):
        if real:
            image = Image.open(real[i % len(real)]).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
        else:
            rows, columns = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
            waves = np.stack(
                [np.sin(rows / rng.uniform(5, 90) + columns / rng.uniform(5, 90)) for _ in range(3)], 2
            )
            noisy = 127 + 90 * waves + rng.normal(0, 6, waves.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:04d}.jpg", quality=90)
    for i in range(DIFFERENT, PHOTOS):
        shutil.copyfile(folder / f"{i % DIFFERENT:04d}.jpg", folder / f"{i:04d}.jpg")


def write_model(folder: Path) -> None:
    """Write a small image model with random weights."""
    from manyheads.core import hub
    from manyheads.core.catalog import create_model
    from manyheads.vision.preprocessing import Preprocessing

    sizes = {"img_size": 224, "patch_size": 32, "depth": 2, "num_classes": 10}
    about = {"domain": "vision", "name": MODEL, "arguments": sizes, "labels": [str(i) for i in range(10)]}
    preprocessing = Preprocessing((224, 224)).to_json()
    hub.save(folder, create_model(MODEL, **sizes), preprocessing=preprocessing, **about)


def loop(model: str, photos: str, table: str) -> None:
    """Predict a folder as one would by hand, and print what it took."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    import manyheads

    begin = time.perf_counter()
    predictor = manyheads.load(model)
    network, load = predictor.model, predictor.preprocessing.load
    starting, rows = time.perf_counter() - begin, []
    paths = sorted(Path(photos).iterdir())
    for first in range(0, len(paths), BATCH):
        batch = paths[first : first + BATCH]
        with torch.inference_mode():
            probabilities = network(torch.stack([load(path) for path in batch])).softmax(1)
        top = probabilities.topk(5)
        for path, values, classes in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
            rows.append({"id": path.name, "label": classes, "probability": values})
    pq.write_table(pa.Table.from_pylist(rows), table)
    print(json.dumps({"rows": len(rows), "seconds": time.perf_counter() - begin, "starting": starting}))


if __name__ == "__main__":
    loop(*sys.argv[1:])
