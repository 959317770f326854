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
