"""An epoch of ETTh1 train windows, 96 -> 96: one gather a batch against Python slices and a DataLoader.

Run: python benchmarks/windows.py. The two take turns in one run; medians are compared, of the time on the
clock and of the time on the processor, which other programs' load changes less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from manyheads.timeseries.data import ForecastData

EPOCHS = 9


class Slices(Dataset[dict[str, NDArray[np.float32]]]):
    """The usual way: a window is four slices of numpy arrays, and a DataLoader stacks them."""

    def __init__(self, rows: Tensor, n_values: int, seq_len: int, pred_len: int) -> None:
        self.values, self.marks = rows[:, :n_values].numpy(), rows[:, n_values:].numpy()
        self.seq_len, self.pred_len = seq_len, pred_len

    def __len__(self) -> int:
        return len(self.values) - self.seq_len - self.pred_len + 1

    def __getitem__(self, i: int) -> dict[str, NDArray[np.float32]]:
        middle, end = i + self.seq_len, i + self.seq_len + self.pred_len
        return {
            "x": self.values[i:middle],
            "y": self.values[middle:end],
            "x_mark": self.marks[i:middle],
            "y_mark": self.marks[middle:end],
        }


def epoch(loader: Iterable[object]) -> tuple[float, float]:
    start, busy = time.perf_counter(), time.process_time()
    for _ in loader:
        pass
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    data = ForecastData(dataset="etth1", seq_len=96, pred_len=96, batch_size=32)
    data.setup()
    ours = data.train_dataloader()
    windows = data.train_windows
    slices = Slices(windows.rows[:8640], windows.n_values, 96, 96)
    theirs = DataLoader(slices, 32, shuffle=True, drop_last=True)
    assert len(ours) == len(theirs) == 264
    times: dict[str, list[tuple[float, float]]] = {"slices": [], "gather": []}
    for _ in range(EPOCHS):
        times["slices"].append(epoch(theirs))
        times["gather"].append(epoch(ours))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 264 batches of 32, {EPOCHS} epochs")
    for i, clock in enumerate(("wall", "processor")):
        slow, fast = (
            1e3 * statistics.median(each[i] for each in times[name]) for name in ("slices", "gather")
        )
        print(f"{clock:9}  slices {slow:7.1f} ms, gather {fast:6.2f} ms, {slow / fast:5.1f}x (at least 15)")


if __name__ == "__main__":
    main()
