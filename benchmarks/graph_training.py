"""Trainings of graph configs over seeds and models: python -m benchmarks.graph_training TABLE [--seeds 10].

Each line is `manyheads graph fit` and `test` of a shipped config, with what the line changes, once a seed;
the table gives the mean and the deviation of the test's figure. Stored in
benchmarks/results/graph_training.json, and as a page beside it; lines that are not run again stay.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml

from benchmarks.measure import machine
from manyheads.apps import cli
from manyheads.core import catalog, hub

RESULTS = Path(__file__).parent / "results" / "graph_training.json"
HEADER = (
    "config", "model", "parameters", "figure", "mean", "deviation", "seeds", "epochs", "CPU seconds a run",
)  # fmt: skip
SMALL: dict[str, object] = {"hidden_dim": 64, "L": 4, "dropout": 0.1, "readout": "mean"}


@dataclass(frozen=True)
class Line:
    """A training: a shipped config, and what is changed in it."""

    config: str
    figure: str
    model: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)


def _models(config: str, figure: str) -> tuple[Line, ...]:
    """The same budget for each; GPS alone attends to all nodes, and carries encodings as the first does."""
    attending = {"n_heads": 4}
    return (
        Line(config, figure, "graph_transformer", SMALL | attending),
        Line(config, figure, "gps", SMALL | attending),
        Line(config, figure, "gine", SMALL),
        Line(config, figure, "gcn", SMALL),
        Line(config, figure, "gated_gcn", SMALL),
    )


TABLES: dict[str, tuple[Line, ...]] = {
    "cora": (Line("gcn_cora", "test_accuracy"), Line("graph_transformer_cora", "test_accuracy")),
    "esol": _models("esol", "test_rmse"),
    "tox21": _models("tox21", "test_roc_auc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--seeds", type=int, default=10, help="trainings of each line, from seed 0 on")
    parser.add_argument("--only", metavar="MODEL", help="this model's line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for line in TABLES[options.table]:
        if options.only in (None, line.model or line.config):
            row = measure(line, options.seeds)
            store(options.table, row)
            print(text(row), flush=True)


def measure(line: Line, seeds: int) -> dict[str, object]:
    """Train and test a line once a seed."""
    found, seconds, epochs = [], [], []
    model, parameters = "", 0
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            figures = train(line, seed, Path(folder))
            seconds.append(time.process_time() - begun)
            config = hub.read_config(Path(folder) / "model")
            model = config.name
            parameters = sum(
                p.numel() for p in catalog.create_model(config.name, **config.arguments).parameters()
            )
            epochs.append(config.training["epochs"])
        found.append(figures[line.figure])
        print(f"  {line.config} {model} seed {seed}: {line.figure} {found[-1]:.4f}", flush=True)
    return {
        "config": line.config,
        "model": model,
        "parameters": parameters,
        "figure": line.figure,
        "mean": statistics.fmean(found),
        "deviation": statistics.stdev(found) if seeds > 1 else 0.0,
        "values": found,
        "epochs": epochs,
        "cpu_seconds": statistics.median(seconds),
        "line": asdict(line),
    }


def train(line: Line, seed: int, folder: Path) -> dict[str, float]:
    """Fit and test by the command line, as a user would; return the test's figures."""
    changes: dict[str, object] = {"seed_everything": seed, "data": dict(line.data)}
    if line.model:
        changes["model"] = {"name": line.model, "arguments": dict(line.arguments)}
    changed = folder / "line.yaml"
    changed.write_text(yaml.safe_dump(changes))
    args = ["--config", line.config, "--config", str(changed), "--output", str(folder)]
    said = io.StringIO()
    for action in ("fit", "test"):
        with contextlib.redirect_stdout(said):
            code = cli.main(["graph", action, *args])
        if code:
            raise SystemExit(f"{said.getvalue()}\n{line}: {action} ended with {code}")
    figures: dict[str, float] = json.loads((folder / "test.json").read_text())
    return figures


def store(table: str, row: Mapping[str, object]) -> None:
    """Put a row in the place of the one of the same config and model."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"tables": {}}
    rows = stored["tables"].get(table, [])
    same = [
        i for i, each in enumerate(rows) if (each["config"], each["model"]) == (row["config"], row["model"])
    ]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    stored["machine"], stored["tables"][table] = machine(), rows
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(stored["tables"]))


def page(tables: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Return the stored rows as a page."""
    lines = ["# Trainings of graph models", ""]
    for name, rows in tables.items():
        lines += [f"`python -m benchmarks.graph_training {name}`", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [f"| {text(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def text(row: Mapping[str, object]) -> str:
    """Return a row of the page."""
    values, epochs = row["values"], row["epochs"]
    assert isinstance(values, list) and isinstance(epochs, list)
    return (
        f"{row['config']} | {row['model']} | {row['parameters']:,} | {row['figure']} | {row['mean']:.4f} | "
        f"{row['deviation']:.4f} | {len(values)} | {statistics.median(epochs):.0f} | {row['cpu_seconds']:.0f}"
    )


if __name__ == "__main__":
    main()
