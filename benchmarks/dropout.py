"""Dropout on the CPU against torch's own, at the size of one activation of a small iTransformer.

Run: python benchmarks/dropout.py. The two take turns in one run; medians of the processor's time are
compared, which other programs' load changes less than the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.dropout import dropout

ROUNDS = 300


def seconds(drop: Callable[[Tensor, float], Tensor], x: Tensor) -> float:
    start = time.process_time()
    drop(x, 0.1).backward(x)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(32, 11, 256, requires_grad=True)
    found: dict[str, list[float]] = {"torch": [], "manyheads": []}
    for _ in range(ROUNDS):
        found["torch"].append(seconds(F.dropout, x))
        found["manyheads"].append(seconds(dropout, x))
    ours, theirs = (statistics.median(found[name]) * 1e6 for name in ("manyheads", "torch"))
    print(
        f"forward and backward of {x.numel():,} elements: torch {theirs:.0f} us, manyheads {ours:.0f} us",
        end="",
    )
    print(f" ({theirs / ours:.2f}x)")


if __name__ == "__main__":
    main()
