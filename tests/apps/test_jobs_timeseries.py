"""Batch jobs over real forecasts, through the command line; the proof at scale is slow.

`pytest -m slow tests/apps/test_jobs_timeseries.py -s` prints the proof's figures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import manyheads
from manyheads.apps.jobs import JobOptions, run_job
from manyheads.core import hub
from manyheads.timeseries.data import ForecastData

START = np.datetime64("2020-01-01T00", "s")
COMMAND = """
import sys
from manyheads.apps.cli import main
code = main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)  # MiB; ru_maxrss would count the parent's memory at the fork
sys.exit(code)
"""


def write_series(path, series, rows, start=0):
    """Write hourly series of daily waves and noise, a hundred at a time; the same series each time."""
    hours = START + np.arange(rows) * np.timedelta64(1, "h")
    with path.open("wb") as file:
        for first in range(start, start + series, 100):
            ids = range(first, min(first + 100, start + series))
            noise = np.random.default_rng(first).normal(size=(100, rows))[: len(ids)]
            wave = np.sin(np.arange(rows) * 2 * np.pi / 24) * (1 + np.arange(len(ids)) % 7)[:, None]
            table = pa.table(
                {
                    "unique_id": np.repeat([f"series{i:05d}" for i in ids], rows),
                    "ds": np.tile(hours, len(ids)),
                    "y": np.round(10 + wave + noise, 3).ravel(),
                }
            )
            options = pa.csv.WriteOptions(include_header=first == start, quoting_style="none")
            pa.csv.write_csv(table, file, options)
    return path


def write_model(folder, name, **arguments):
    """Write a model folder of random weights for such series."""
    data = ForecastData(str(write_series(folder / "train.csv", 3, 1000)), seq_len=96, pred_len=96)
    data.setup()
    arguments = {"seq_len": 96, "pred_len": 96, **arguments}
    model = manyheads.create_model(name, **arguments)
    preprocessing = data.preprocessing()
    hub.save(
        folder / "model",
        model,
        domain="timeseries",
        name=name,
        arguments=arguments,
        preprocessing=preprocessing,
    )
    return folder / "model"


def test_job_writes_what_predict_returns(tmp_path):
    model = write_model(tmp_path, "dlinear")
    source = write_series(tmp_path / "in.csv", 10, 120)
    with source.open("a") as file:
        file.write("short,2020-01-01 00:00:00,1.0\n")
    options = JobOptions(
        str(model), [str(source)], tmp_path / "out", shard_size=4, batch_size=3, max_bad=0.1, quiet=True
    )
    result = run_job(options)
    assert (result.records, result.rows, result.bad, result.shards, result.exit_code) == (11, 960, 1, 3, 0)
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad-00002.jsonl").read_text().splitlines()]
    assert [each["id"] for each in bad] == ["short"]
    assert "too short" in bad[0]["reason"]
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    found = pd.concat([pq.read_table(part).to_pandas() for part in parts], ignore_index=True)
    wanted = manyheads.load(model).predict(str(write_series(tmp_path / "good.csv", 10, 120)))
    assert list(found.columns) == list(wanted.columns)
    assert found["unique_id"].tolist() == wanted["unique_id"].tolist()
    assert found["ds"].tolist() == wanted["ds"].tolist()
    np.testing.assert_allclose(found["yhat"], wanted["yhat"], rtol=1e-5)  # other batches: float32 sums differ


def write_stores(path, series, rows, horizon):
    """Write long parquet of stores with covariates of every role, gaps, and the future of each at its end."""
    total = rows + horizon
    hours = START.astype("datetime64[us]") + np.arange(total) * np.timedelta64(1, "h")
    writer = None
    for first in range(0, series, 100):
        n = min(100, series - first)
        rng = np.random.default_rng(first)
        price, promo = rng.normal(9.0, 1.0, (n, total)), rng.random((n, total)) < 0.2
        level = 10.0 ** rng.integers(0, 4, (n, 1))
        y = level * (
            10 - price + 2 * promo + np.sin(np.arange(total) * 2 * np.pi / 24) + rng.normal(size=(n, total))
        )
        gaps = rng.random((n, total)) < 0.02
        wind = np.where(rng.random((n, total)) < 0.02, np.nan, rng.normal(size=(n, total)))
        y[:, rows:] = wind[:, rows:] = np.nan
        columns = {
            "unique_id": np.repeat([f"store{i:05d}" for i in range(first, first + n)], total),
            "ds": np.tile(hours, n),
            "y": np.where(gaps, np.nan, y).ravel(),
            "wind": wind.ravel(),
            "price": price.ravel(),
            "promo": np.where(promo, "yes", "no").ravel(),
            "size": np.repeat(level[:, 0], total),
            "region": np.repeat([f"region {i % 7}" for i in range(first, first + n)], total),
        }
        table = pa.table({name: pa.array(cells, from_pandas=True) for name, cells in columns.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return path


def write_store_model(folder, output, quantiles):
    """Write a model folder of random weights for such stores."""
    data = ForecastData(
        str(write_stores(folder / "train.parquet", 20, 400, 0)),
        seq_len=96,
        pred_len=24,
        targets=["y"],
        past=["wind"],
        future=["price", "promo"],
        static=["size", "region"],
        categorical=["promo", "region"],
        scaling="series",
        missing="mask",
    )
    arguments = {
        "base": "itransformer",
        "seq_len": 96,
        "pred_len": 24,
        "arguments": {"d_model": 64, "d_ff": 64, "n_heads": 4},
        "output": output,
        "quantiles": quantiles,
        **data.covariate_sizes,
    }
    model, preprocessing = manyheads.create_model("forecaster", **arguments), data.preprocessing()
    options = {"domain": "timeseries", "name": "forecaster", "arguments": arguments}
    hub.save(folder / "model", model, **options, preprocessing=preprocessing)
    return folder / "model"


def run_stores(model, source, folder, batch_size):
    """Run a job; its rows in order, and its seconds."""
    begin = time.perf_counter()
    options = JobOptions(str(model), [str(source)], folder, batch_size=batch_size, quiet=True)
    result = run_job(options)
    seconds = time.perf_counter() - begin
    assert (result.bad, result.exit_code) == (0, 0)
    parts = sorted(folder.glob("part-*.parquet"))
    return pd.concat([pq.read_table(part).to_pandas() for part in parts], ignore_index=True), seconds


def check_stores(tmp_path, series, rows, output="quantile", quantiles=(0.1, 0.5, 0.9)):
    """Forecast stores in batches and one by one; each row must be the same."""
    model = write_store_model(tmp_path, output, list(quantiles) if output == "quantile" else None)
    source = write_stores(tmp_path / "in.parquet", series, rows, 24)
    together, seconds = run_stores(model, source, tmp_path / "together", 64)
    alone, seconds_alone = run_stores(model, source, tmp_path / "alone", 1)
    names = [f"yhat_q{level}" for level in quantiles]
    assert list(together.columns) == ["unique_id", "ds", "yhat", *names]
    assert len(together) == series * 24
    assert not together.duplicated(["unique_id", "ds"]).any()
    assert together[["unique_id", "ds"]].equals(alone[["unique_id", "ds"]])
    values = ["yhat", *names]
    assert np.isfinite(together[values]).all(axis=None)
    assert (np.diff(together[names]) >= 0).all()
    scale = together.groupby("unique_id")["yhat"].transform(lambda rows: rows.abs().max())
    worst = (together[values] - alone[values]).abs().max(axis=1).div(scale).max()
    assert worst < 1e-5
    return source, seconds, seconds_alone, worst


@pytest.mark.parametrize("output", ["quantile", "student_t"])
def test_quantiles_of_series_with_covariates_and_gaps(tmp_path, output):
    check_stores(tmp_path, 5, 150, output)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quantiles_of_a_thousand_series_with_covariates_and_gaps(tmp_path):
    """1,000 stores of 2,000 hours: the rows of batches are those of the series one by one."""
    source, seconds, alone, worst = check_stores(tmp_path, 1000, 2000)
    print(
        f"\n1,000 series of 2,000 rows ({source.stat().st_size / 1e6:.0f} MB): {seconds:.1f} s in "
        f"batches of 64, {alone:.1f} s one by one; the rows differ by {worst:.1e} at most"
    )


def start(*arguments):
    """Start `manyheads predict` in a process that prints its peak memory at the end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", COMMAND, "predict", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process):
    """Wait for a run; its peak memory in MiB."""
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == 0
    return float(out)


def kill_after(process, output, parts):
    """Kill a run as soon as so many parts are there."""
    while len(list(output.glob("part-*"))) < parts:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "_SUCCESS").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_series_killed_twice_and_ten_times_the_input(tmp_path, inspect_folder):
    """1,000 series of 2,000 rows: the same bytes after two kills; ten times as many, 1.2 times the memory."""
    model = write_model(tmp_path, "itransformer", d_model=128, n_heads=8, e_layers=2, d_ff=128)
    source = write_series(tmp_path / "in.csv", 1000, 2000)
    begin = time.perf_counter()
    peak = finish(start(model, source, "-o", tmp_path / "undisturbed"))
    seconds = time.perf_counter() - begin

    killed = tmp_path / "killed"
    kill_after(start(model, source, "-o", killed), killed, 4)
    kill_after(start(model, source, "-o", killed, "--resume"), killed, 10)
    finish(
        start(model, source, "-o", killed, "--resume", "--workers", 2)
    )  # threads are the job's, not the run's
    assert inspect_folder.digests(killed) == inspect_folder.digests(tmp_path / "undisturbed")
    frame = pd.concat([pq.read_table(part).to_pandas() for part in sorted(killed.glob("part-*"))])
    assert len(frame) == 1000 * 96
    assert not frame.duplicated(["unique_id", "ds"]).any()

    large = write_series(tmp_path / "large.csv", 10_000, 2000)
    sizes = [Path(each).stat().st_size / 1e6 for each in (source, large)]
    begin = time.perf_counter()
    large_peak = finish(start(model, large, "-o", tmp_path / "large"))
    large_seconds = time.perf_counter() - begin
    print(
        f"\n1,000 series ({sizes[0]:.0f} MB): {seconds:.1f} s, {1000 / seconds:.0f} series/s, {peak:.0f} MiB;"
        f" 10,000 ({sizes[1]:.0f} MB): {large_seconds:.1f} s, {10_000 / large_seconds:.0f} series/s,"
        f" {large_peak:.0f} MiB"
    )
    assert large_peak <= 1.2 * peak
