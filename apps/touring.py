"""Runs a tour of `manyheads quickstart`: the commands that a user would type, one after the other."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from manyheads.apps import cli, tour_pieces
from manyheads.apps.tours import Tour
from manyheads.core.errors import ManyheadsError

METRICS = "metrics.json"
ROWS = 4  # of the job that are shown


def run(domain: str, tour: Tour, output: Path, epochs: int, seed: int | None) -> int:
    """Train, test, predict, plot and compare.

    Args:
        domain: The tour's domain.
        tour: What is done.
        output: The folder, which does not exist or is empty.
        epochs: Of the training.
        seed: Of the training; the config's if None.

    Returns:
        The exit code.

    Raises:
        ManyheadsError: A command failed.
    """
    start = time.perf_counter()
    print(f"{tour.title}\n{domain}: train, test, save, predict, plot; all of it goes to {output}/")
    fit = [domain, "fit", "--config", tour.config, "--output", str(output), *tour.options]
    fit += ["--trainer.max_epochs", str(epochs)]
    _step(fit if seed is None else [*fit, "--seed_everything", str(seed)])
    _step([domain, "test", "--config", str(output / "config.yaml")])
    source = getattr(tour_pieces, tour.source)(output)
    _step(["predict", str(output / "model"), str(source), "-o", str(output / tour.job)])
    _show_rows(output / tour.job, tour.columns)
    if tour.plot:
        _step([word.format(output) for word in tour.plot])
    used = json.loads((output / "model/config.json").read_text())["training"]
    found = json.loads((output / "test.json").read_text())
    mine = tuple(found[name] for name in tour.figures.values())
    baselines = getattr(tour_pieces, tour.baselines)(output, used["seed"])
    epochs_done = f"{used['epochs']} epoch{'s' if used['epochs'] != 1 else ''}"
    rows = {f"this run, {epochs_done}": mine, **tour.beside, **baselines}
    metrics = {name: dict(zip(tour.figures, figures, strict=True)) for name, figures in rows.items()}
    (output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    _report(tour, output, rows, time.perf_counter() - start)
    return 0


def _step(args: Sequence[str]) -> None:
    """Run a command as if it were typed."""
    print(f"\n$ manyheads {shlex.join(args)}", flush=True)
    code = cli.dispatch(args)
    if code:
        raise ManyheadsError(f"`manyheads {shlex.join(args)}` ended with exit code {code}")


def _show_rows(job: Path, columns: Sequence[str]) -> None:
    import pandas as pd

    part = min(job.glob("part-*.parquet"))
    table = pd.read_parquet(part)
    print(table[[name for name in columns if name in table]].head(ROWS).to_string(index=False))


def _report(tour: Tour, output: Path, rows: dict[str, tuple[float, ...]], seconds: float) -> None:
    """Print the figures side by side, the files, and what to do next."""
    width = max(map(len, rows))
    print(f"\n{'test':{width}}" + "".join(f"  {heading:>11}" for heading in tour.figures))
    for name, figures in rows.items():
        print(f"{name:{width}}" + "".join(f"  {figure:11.4f}" for figure in figures))
    print(f"\n{output}/ was filled in {seconds:.0f} s:")
    files = {
        "model": "the model folder",
        tour.job: "the job: part-*.parquet, _SUCCESS",
        **tour.pictures,
        METRICS: "the table above",
    }
    width = max(map(len, files))
    for name, what in files.items():
        print(f"  {name:{width}}  {what}")
    print("next:")
    for command in tour.next:
        print(f"  {command.format(output)}")
