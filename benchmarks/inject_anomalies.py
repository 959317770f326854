"""Write a table's copy with anomalies in its test rows, and a column that says where.

    python -m benchmarks.inject_anomalies ETTh1.csv anomalies.csv [--only spike]

Spikes (one row), level shifts and flat runs (12 to 48 rows), each of one column, at places that a seed fixes.
The test rows are those of the published protocol: 11,520 to 14,400.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

FIRST, END = 11_520, 14_400
COUNTS = {"spike": 30, "shift": 6, "flat": 6}


def inject(table: pd.DataFrame, seed: int = 0, counts: Mapping[str, int] = COUNTS) -> pd.DataFrame:
    """Return a copy with anomalies, so many of each kind, and a column `anomaly` of 0 and 1.

    A spike adds 4 to 8 of its column's deviations to a row, a shift 2 to 4 to each of its rows; a flat run
    repeats its first value. Anomalies keep 8 rows apart.
    """
    rng = np.random.default_rng(seed)
    columns = [name for name in table.columns if pd.api.types.is_numeric_dtype(table[name])]
    values, taken = table[columns].to_numpy(np.float64), np.zeros(len(table), bool)
    deviation, label = values[:FIRST].std(axis=0), np.zeros(len(table), np.int64)
    for kind, count in counts.items():
        for _ in range(count):
            length = 1 if kind == "spike" else int(rng.integers(12, 49))
            at = int(rng.integers(FIRST, END - length))
            while taken[max(0, at - 8) : at + length + 8].any():
                at = int(rng.integers(FIRST, END - length))
            rows, column, sign = slice(at, at + length), int(rng.integers(len(columns))), rng.choice([-1, 1])
            if kind == "flat":
                values[rows, column] = values[at, column]
            else:
                size = rng.uniform(4, 8) if kind == "spike" else rng.uniform(2, 4)
                values[rows, column] += sign * size * deviation[column]
            taken[rows], label[rows] = True, 1
    return table.assign(**dict(zip(columns, values.T, strict=True)), anomaly=label)


def main() -> None:
    """Read, inject, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COUNTS), help="anomalies of one kind")
    given = parser.parse_args()
    counts = {given.only: COUNTS[given.only]} if given.only else COUNTS
    made = inject(pd.read_csv(given.source), given.seed, counts)
    made.to_csv(given.target, index=False)
    print(f"{given.target}: {int(made.anomaly.sum())} of {END - FIRST} test rows are anomalies")


if __name__ == "__main__":
    main()
