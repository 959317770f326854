"""Training on large data: 10,000 series of 2,000 rows within 3 GiB, and memory that windows add nothing to.

`pytest -m slow tests/timeseries/test_large.py -s` prints the figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TRAIN = """
import sys, time
begin = time.perf_counter()
import torch
from lightning.pytorch import Trainer
from manyheads.timeseries.data import ForecastData
from manyheads.timeseries.task import Forecaster

torch.set_num_threads(1)
data = ForecastData(sys.argv[1], seq_len=int(sys.argv[2]), pred_len=24, batch_size=32)
task = Forecaster("dlinear", seq_len=int(sys.argv[2]), pred_len=24)
trainer = Trainer(
    max_epochs=1, limit_train_batches=50, limit_val_batches=20, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
)
trainer.fit(task, datamodule=data)
assert trainer.callback_metrics["train_loss"] > 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) / 1024
print(peak, len(data.train_windows), time.perf_counter() - begin)
"""


def write(path: Path, series: int, rows: int) -> Path:
    """Write hourly series, a hundred at a time."""
    hours = np.datetime64("2020-01-01T00", "us") + np.arange(rows) * np.timedelta64(1, "h")
    writer = None
    for first in range(0, series, 100):
        ids = [f"series{i:05d}" for i in range(first, min(first + 100, series))]
        values = np.random.default_rng(first).normal(10.0, 2.0, len(ids) * rows)
        columns = {"unique_id": np.repeat(ids, rows), "ds": np.tile(hours, len(ids)), "y": values}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return path


def train(path: Path, seq_len: int = 96) -> tuple[float, int, float]:
    """Train one epoch of some batches in a process of its own; its peak in MiB, windows, and seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(path), str(seq_len)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=1200,
    )
    peak, windows, seconds = done.stdout.split()[-3:]
    return float(peak), int(windows), float(seconds)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_series_train_within_three_gibibytes(tmp_path: Path) -> None:
    peak, windows, seconds = train(write(tmp_path / "t.parquet", 10_000, 2000))
    print(f"\n10,000 x 2,000: {windows} train windows, {peak:.0f} MiB, {seconds:.0f} s in all")
    assert windows == 10_000 * (1400 - 96 - 24 + 1)
    assert peak <= 3 * 1024


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_memory_grows_with_the_rows_once_and_not_with_the_windows(tmp_path: Path) -> None:
    """The same rows in few long series, in many short ones, and in longer windows; and twice as many rows."""
    peaks = {}
    for name, series, rows in (("few", 500, 8000), ("many", 4000, 1000), ("twice", 1000, 8000)):
        peaks[name], windows, seconds = train(write(tmp_path / f"{name}.parquet", series, rows))
        print(f"\n{series} x {rows}: {windows} train windows, {peaks[name]:.0f} MiB, {seconds:.0f} s")
    wide, windows, _ = train(tmp_path / "few.parquet", seq_len=720)
    print(f"500 x 8000, seq_len 720: {windows} train windows, {wide:.0f} MiB")
    assert abs(wide - peaks["few"]) <= 50
    assert abs(peaks["many"] - peaks["few"]) <= 50
    # A row keeps 20 bytes (target and calendar in float32), 16 are read (time, target), 4 order its window.
    assert peaks["twice"] - peaks["few"] <= 4_000_000 * 60 / 2**20
