"""Pages of what was measured: speed beside peers, parity with originals, and results that are written as pages."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KILLED = {
    "runner": "one process",
    "workers": "two workers, with files beside the rows",
    "elsewhere": "a file system without rename, which shows half files",
    "ray": "Ray, with files beside the rows",
}
RECORDED = (
    "Inputs, weights, outputs and gradients of the original's own code, small and mostly in float64; every row's cases are"
    " compared in each run of the tests."
)


def tables() -> list[Path]:
    """Results that are written as pages; those of faults are part of theirs."""
    return sorted({*RESULTS.glob("*.md")} - {RESULTS / "hub_faults.md"})


def speed() -> str:
    """The tables of speed beside peers."""
    lines = [
        "# Speed",
        "",
        "Ratios are the peer's median over ours, both in one run on the same numbers and threads: above 1 we are faster. A line",
        "below 1, or one that misses what we asked of it, stands here like the others. `python -m benchmarks TABLE` makes each",
        "table anew on your machine.",
        "",
    ]
    for path in sorted({*RESULTS.glob("*_cpu.json")} - {*RESULTS.glob("jobs_*")}):  # a page of their own
        content = json.loads(path.read_text())
        rows = content["rows"]
        name = path.stem.removesuffix("_cpu")
        lines += [
            f"## {name}",
            "",
            f"`python -m benchmarks {name}`, {_about(content)}.",
            "",
            "| what | size | ours, ms | peer, ms | ratio | asked | peer |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if "text" in row:  # a line that compares nothing
                lines.append(f"| {row['name']} | {row['shape']} | | | | | {row['text']} |")
                continue
            asked = (
                ""
                if row.get("target") is None
                else f"{row['target']:g}" + ("" if row["met"] else " (missed)")
            )
            lines.append(
                f"| {row['name']} | {row['shape']} | {row['ours_ms']:.2f} | {row['peer_ms']:.2f} |"
                f" {row['ratio']:.2f} | {asked} | {row['peer']} |"
            )
        lines.append("")
    return "\n".join(lines)


def parity() -> str:
    """The runs beside originals, and the originals that are recorded."""
    lines = [
        "# Parity",
        "",
        "The same weights give the same outputs: a model enters with recorded tensors of its original (`tests/golden`, with the",
        "repository and commit that they are of), the exact number of parameters, and gradients. Where an original installs",
        "cleanly it also runs beside ours; these are those runs.",
        "",
    ]
    vision = json.loads((ROOT / "benchmarks/results/parity_vision.json").read_text())
    rows = vision["rows"]
    worst = max(row["outputs"] for row in rows)
    lines += [
        "## Images",
        "",
        f"`python -m benchmarks.parity`, {', '.join(f'{k} {v}' for k, v in vision['facts'].items())}: {sum(r['ok'] for r in rows)} of"
        f" {len(rows)} agree, outputs to {worst:.1e}.",
        "",
        "| model | original | parameters | outputs differ | gradients differ |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gradients = "" if row["gradients"] is None else f"{row['gradients']:.1e}"
        lines.append(
            f"| `{row['name']}` | {row['original']} | {row['parameters']:,} | {row['outputs']:.1e} | {gradients} |"
        )
    speech = json.loads((ROOT / "benchmarks/results/parity_speech.json").read_text())
    lines += ["", "## Speech", "", "`python -m benchmarks.speech_parity`", ""]
    lines += [
        "| model | original | parameters | outputs differ | tokens, ours and theirs |",
        "|---|---|---|---|---|",
    ]
    for row in speech["rows"]:
        tokens = "" if row["tokens"] is None else f"{row['tokens']}, {row['peer_tokens']}"
        outputs = ", ".join(f"{name} {value:.1e}" for name, value in row["outputs"].items())
        lines.append(f"| `{row['name']}` | {row['peer']} | {row['parameters']:,} | {outputs} | {tokens} |")
    lines += ["", "## Recorded originals", "", RECORDED, ""]
    lines += ["| tests | original | at | cases |", "|---|---|---|---|"]
    for (room, original, at), cases in sorted(_recorded().items()):
        lines.append(f"| `tests/{room}` | {original} | {at} | {cases} |")
    return "\n".join([*lines, ""])


def _recorded() -> Counter[tuple[str, str, str]]:
    """How many cases of each original are kept, by the room whose tests compare with them."""
    found: Counter[tuple[str, str, str]] = Counter()
    for path in (ROOT / "tests" / "golden").glob("*/*.json"):
        case = json.loads(path.read_text(encoding="utf-8"))
        commit = re.match("[0-9a-f]{7}", str(case.get("commit") or ""))
        at = f"commit {commit[0]}" if commit else case.get("package_version") or ""
        found[path.parent.name, case["repo"].partition(" (")[0], at.partition(",")[0]] += 1
    return found


def faults() -> str:
    """What was broken on purpose, and the throughput of jobs."""
    downloads, inputs = (RESULTS / "hub_faults.md").read_text(encoding="utf-8").strip().split("\n\n")[2:]
    kills = json.loads((RESULTS / "kills.json").read_text())
    total = sum(row["runner"] + row["worker"] for row in kills.values())
    jobs = sum(row["jobs"] for row in kills.values())
    lines = [
        "# Faults and jobs",
        "",
        "What was broken on purpose, and what came of it; [threats](threats.md) says what holds against what.",
        "",
        "## Downloads",
        "",
        "From a server on loopback that speaks the hub's protocol: what had the right hash was taken, the rest refused.",
        "`pytest -m slow tests/core/test_hostile.py`",
        "",
        downloads,
        "",
        "## Hostile inputs",
        "",
        "Mutated at random, by the same command: refused in a line, or harmless and taken; none crashed, nothing was executed.",
        "",
        inputs,
        "",
        "## Kills",
        "",
        f"{total} times SIGKILL at random moments of {jobs} [batch jobs](how-to/jobs.md), resumed until done: the same bytes as an undisturbed job, each",
        "time. `pytest -m slow tests/apps/test_jobs_kills.py`",
        "",
        "| where the job ran | runners killed | workers killed | jobs | shards a job | same bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in kills.items():
        lines.append(
            f"| {KILLED[name]} | {row['runner']} | {row['worker']} | {row['jobs']} | {row['shards']} | {row['jobs']} |"
        )
    for path in sorted(RESULTS.glob("jobs_*.json")):
        content = json.loads(path.read_text())
        lines += ["", "## Throughput by engine", "", f"`python -m benchmarks jobs`, {_about(content)}.", ""]
        lines += ["| engine | input | figures |", "|---|---|---|"]
        for row in content["rows"]:
            missed = "" if row["met"] else " (missed)"
            lines.append(f"| {row['name']} | {row['shape']} | {row['text']}{missed} |")
    return "\n".join([*lines, ""])


def _about(content: dict[str, Any]) -> str:
    """The date and the machine of a table."""
    return f"{content['date']}: " + ", ".join(f"{k} {v}" for k, v in content["machine"].items())
