"""Fixtures: processes that run the command line, and a small run of each task."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

RUNNER = Path(__file__).with_name("runner.py")
DATA = os.environ.get("MANYHEADS_DATA")
# What needs no data of others first: task, config, and what makes its data.
SMALL = {
    "timeseries": """\
task: forecast
model: {name: itransformer, arguments: {d_model: 16, d_ff: 16, n_heads: 2, e_layers: 1, dropout: 0.1}}
data: {dataset: FOLDER/hours.csv, seq_len: 24, pred_len: 12, batch_size: 16}
""",
    "imputation": """\
task: imputation
model: {name: itransformer, arguments: {d_model: 16, d_ff: 16, n_heads: 2, e_layers: 1, dropout: 0.1}}
data: {dataset: FOLDER/hours.csv, seq_len: 24, batch_size: 16}
""",
    "anomaly": """\
task: anomaly
model: {name: itransformer, arguments: {d_model: 16, d_ff: 16, n_heads: 2, e_layers: 1, dropout: 0.1}}
data: {dataset: FOLDER/hours.csv, seq_len: 24, batch_size: 16}
""",
    "vision": """\
model:
  name: vit_tiny_patch16_224
  arguments: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}
  schedule: {warmup_epochs: 0.5}
  regularize: {mixup: 0.2, drop_path: 0.1, drop_rate: 0.1, ema_decay: 0.9}
data: {dataset: FOLDER/images, batch_size: 8, augment: {pad: 1, randaugment: 1}}
""",
    "recognition": """\
task: recognition
model:
  name: paraformer
  arguments: {dim: 32, units: 64, encoder_blocks: 2, decoder_blocks: 1, dropout: 0.1}
  optimizer: {learning_rate: 3.0e-3, warmup_steps: 3}
data:
  joining: {train: 60, val: 12, test: 18, longest: 3}
  loading: {batch_seconds: 20, buckets: 4, cmvn_seconds: 30}
""",
    "separation": """\
task: separation
model:
  name: mossformer
  fresh: published
  arguments: {dim: 16, depth: 1, kernel_size: 64, query_key_dim: 8, group_size: 64, dropout: 0.1}
  optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
data:
  batch_size: 2
  mixing: {seconds: 0.5}
  loading: {epoch_mixtures: 12, val_mixtures: 3, test_mixtures: 3}
""",
    "graph": """\
model:
  name: graph_transformer
  arguments: {hidden_dim: 16, L: 2, n_heads: 2, dropout: 0.1}
  optimizer: {warmup_steps: 2}
data:
  dataset: FOLDER/molecules.csv
  split: {kind: random}
  targets: {names: ["measured log solubility in mols per litre"]}
  encoding: {kind: laplacian, k: 4}
  loading: {batch_size: 8, max_nodes: 400, buckets: 3}
""",
    "recsys": """\
task: recommendation
model:
  name: sasrec
  ks: [1, 5]
  arguments: {hidden_size: 16, layers: 1, hidden_dropout: 0.1, attn_dropout: 0.1}
  optimizer: {schedule: constant, warmup_steps: 2}
data:
  dataset: FOLDER/log.csv
  core: {users: 3, items: 1}
  windows: {length: 12}
  loading: {batch_size: 8}
""",
}
DOMAIN_OF = {
    "imputation": "timeseries",
    "anomaly": "timeseries",
    "recognition": "speech",
    "separation": "speech",
}
BASE = {
    "recognition": ["--config", "paraformer_tiny_digits"],
    "separation": ["--config", "mossformer_tiny_librimix"],
    "graph": ["--config", "esol"],
}
SHARED = tuple(BASE)  # runs on shared data


def write_data(folder: Path) -> None:
    """Series of 600 hours, 96 images of four classes, 100 molecules, and a log of 60 users."""
    rng = np.random.default_rng(0)
    hours = pd.date_range("2024-01-01", periods=600, freq="h", name="date")
    phase = np.arange(600)[:, None] * 2 * np.pi / 24 + np.array([0.0, 1.0, 2.0])
    values = np.sin(phase) + 0.3 * rng.normal(size=(600, 3))
    pd.DataFrame(values, columns=["a", "b", "c"], index=hours).to_csv(folder / "hours.csv")
    for k, label in enumerate(("north_west", "north_east", "south_west", "south_east")):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[4 * (k // 2) :][:4, 4 * (k % 2) :][:, :4] += 100
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    events = [
        (f"u{user}", f"i{(start + step) % 30}", 1_600_000_000 + 1000 * step + user)
        for user in range(60)
        for start in (int(rng.integers(30)),)
        for step in range(5 + user % 12)
    ]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]).to_csv(folder / "log.csv", index=False)
    if DATA:
        molecules = pd.read_csv(Path(DATA) / "graph" / "esol_delaney.csv.gz", nrows=100)
        molecules.to_csv(folder / "molecules.csv", index=False)


class Runner:
    """Runs the command line in processes of its own, forked from one that has imported everything.

    Args:
        folder: For what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": "1", "MANYHEADS_CACHE": str(folder / "cache")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, RUNNER], text=True, env=environment, **pipes)
        self.printed: list[str] = []

    def __call__(
        self, *args: object, processes: int = 1, kill_at: int | None = None, port: int | None = None
    ) -> int:
        """Run one call, by several processes as torchrun would start them; the first one's exit code."""
        port = port or free_port()
        calls = [
            {
                "args": [str(arg) for arg in args],
                "env": torchrun(rank, processes, port) if processes > 1 else {},
                "kill_at": kill_at,
                "out": str(self.folder / f"{self.count}-{rank}.txt"),
            }
            for rank in range(processes)
        ]
        self.count += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(calls), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        self.printed = [Path(str(call["out"])).read_text() for call in calls]
        return int(codes[0])

    def close(self) -> None:
        """End the process: by a line, as others' forked processes may hold its pipe open."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.process.wait(timeout=60)


def torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The command line."""
    runner = Runner(tmp_path_factory.mktemp("printed"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The arguments of a small run, but its folder; without drops nothing is left out by chance."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)

    def arguments(
        name: str, action: str = "fit", options: Sequence[object] = (), drops: bool = True
    ) -> list[str]:
        if name in SHARED and not DATA:
            pytest.skip("MANYHEADS_DATA names no folder of shared data")
        config = SMALL[name].replace("FOLDER", str(folder))
        path = folder / f"{name}{'' if drops else '_plain'}.yaml"
        path.write_text(config if drops else re.sub(r"(drop\w*|mixup): 0\.\d", r"\1: 0.0", config))
        common = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--patience", "99"]
        called = [DOMAIN_OF.get(name, name), action, *BASE.get(name, []), "--config", str(path)]
        return [*called, *common, *map(str, options)]

    return arguments


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], str]:
    """The hash of a run's model."""
    return lambda run: hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
