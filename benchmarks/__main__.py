"""Run a table of benchmarks: python -m benchmarks TABLE [--only OP] [--seconds 6] [--cpu-time] [--no-save].

Prints one line a case, ours and the peer's medians from the same run, and stores the rows with the machine's
facts in benchmarks/results/. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.measure import HEADER, Note, Row, Said, as_json, machine, measure

TABLES = {
    "core": (
        "selective_scan",
        "mamba",
        "window_attention",
        "varlen_attention",
        "local_attention",
        "auto_correlation",
        "prob_sparse_attention",
        "gated_attention_unit",
        "continuous_integrate_and_fire",
        "segment_attention",
        "decay_attention",
        "linear_attention",
        "delta_rule",
        "depthwise_conv1d",
        "fft_conv",
        "flow_attention",
    ),
    "timeseries": ("timeseries",),
    "lagged": ("lagged",),
    "graph": ("graph",),
    "recsys": ("recsys_data", "recsys_models", "recsys_retrieval"),
    "speech": ("mossformer", "paraformer"),
    "vision": ("vision", "vim"),
    "jobs": ("jobs",),
}
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--only", action="append", metavar="OP", help="this op's lines; may be given again")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, on a busy machine; 1 thread")
    parser.add_argument("--no-save", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    names = TABLES[options.table]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))} (has {', '.join(names)})")
    torch.manual_seed(0)
    if options.cpu_time:
        torch.set_num_threads(1)
    facts = machine() | ({"clock": "CPU time"} if options.cpu_time else {})
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("ratio = peer / ours, medians, float32 unless said; below 1 we lose\n" + HEADER)
    rows: list[Row | Said] = []
    for name in options.only or names:
        for case in importlib.import_module(f"benchmarks.{name}").cases(options.device):
            if isinstance(case, Note):
                rows.append(Said(case.name, case.shape, *case.say(options.seconds)))
            else:
                rows.append(measure(case, options.seconds, options.cpu_time))
            print(rows[-1].line(), flush=True)
    if not options.no_save and options.only is None:
        store(options.table, options.device, facts, rows)
    missed = [row.name for row in rows if not row.met]
    print(f"{len(rows) - len(missed)} of {len(rows)} lines meet their target")
    return 1 if missed else 0


def store(table: str, device: str, facts: dict[str, str | int], rows: list[Row | Said]) -> None:
    """Write the rows beside the earlier tables'."""
    RESULTS.mkdir(exist_ok=True)
    found = {"date": datetime.date.today().isoformat(), "machine": facts, "rows": as_json(rows)}
    path = RESULTS / f"{table}_{device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    sys.exit(main())
