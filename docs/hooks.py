"""Pages that are made of data: a page a family of models, speed, parity, and the reference.

mkdocs calls `on_config` and `on_files`. Everything stands in the repository: the catalogue, `docs/figures.yaml`,
`benchmarks/results`; a page that is out of date can only be an old build.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from manyheads.core.catalog import DOMAINS, Entry, arguments, entries

ROOT = Path(__file__).parents[1]
TITLES = {
    "vision": "Images",
    "timeseries": "Time series",
    "speech": "Speech",
    "graph": "Graphs",
    "recsys": "Recommendations",
}
PUBLIC = {
    "The package": ("manyheads",),
    "Ops": ("manyheads.core.ops",),
    "Layers": tuple(
        f"manyheads.core.layers.{name}"
        for name in ("attention", "norm", "mlp", "positions", "mamba", "mamba2", "hydra", "deltanet", "s4")
    ),
    "Catalogue and model folders": ("manyheads.core.catalog", "manyheads.core.hub"),
    "Predictors and jobs": ("manyheads.core.predictor", "manyheads.apps.jobs"),
    "Proof": ("manyheads.core.testing", "manyheads.core.dispatch"),
    "Errors": ("manyheads.core.errors",),
}
HOW_TO = ("own-data", "own-model", "jobs", "clusters", "hub", "serving", "export", "gpu")
KILLED = {
    "runner": "one process",
    "workers": "two workers, with files beside the rows",
    "elsewhere": "a file system without rename, which shows half files",
    "ray": "Ray, with files beside the rows",
}
MANY = 24  # models of a family that are listed with their arguments; of more, the names alone


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation: what is written by hand, and what is made here."""
    config.nav = [
        {"Start": "index.md"},
        {"Tutorials": [{TITLES[d]: f"tutorials/{d}.md"} for d in DOMAINS]},
        {"How to": [f"how-to/{name}.md" for name in HOW_TO]},
        {"Models": ["models/index.md", *({TITLES[d]: _family_pages(d)} for d in DOMAINS)]},
        {"Measured": [{"Speed": "speed.md"}, {"Parity": "parity.md"}, {"Faults and jobs": "faults.md"}]},
        {"Inside": [{"Architecture": "architecture.md"}, {"Threats": "threats.md"}]},
        {"Reference": [{title: _reference_page(title)} for title in PUBLIC]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of data."""
    for path, text in _pages():
        files.append(File.generated(config, path, content=text))
    return files


def _pages() -> Iterable[tuple[str, str]]:
    figures = yaml.safe_load((ROOT / "docs" / "figures.yaml").read_text(encoding="utf-8"))
    yield "models/index.md", _overview(figures)
    for domain in DOMAINS:
        for family, members in families(domain).items():
            yield (
                f"models/{domain}/{family}.md",
                _family(domain, family, members, [f for f in figures if f["family"] == f"{domain}/{family}"]),
            )
    yield "speed.md", _speed()
    yield "parity.md", _parity()
    yield "faults.md", _faults()
    for title, modules in PUBLIC.items():
        yield (
            _reference_page(title),
            "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n",
        )


def families(domain: str) -> dict[str, list[Entry]]:
    """Return a domain's entries by the file of their builder."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(domain):
        found.setdefault(entry.builder.partition(":")[0].rpartition(".")[2], []).append(entry)
    return found


def _family_pages(domain: str) -> list[Any]:
    return [{_title(domain, family): f"models/{domain}/{family}.md"} for family in families(domain)]


def _reference_page(title: str) -> str:
    return f"reference/{title.lower().replace(' ', '-')}.md"


def _source(domain: str, family: str) -> tuple[str, str]:
    """The first line of a family's file, and what follows it."""
    text = (ROOT / domain / "models" / f"{family}.py").read_text(encoding="utf-8")
    first, _, rest = (ast.get_docstring(ast.parse(text)) or family).partition("\n")
    return first, rest.strip()


def _title(domain: str, family: str) -> str:
    return _source(domain, family)[0].partition(":")[0].partition(",")[0].partition(";")[0].rstrip(".")[:48]


def _family(domain: str, family: str, members: Sequence[Entry], figures: Sequence[dict[str, str]]) -> str:
    first, rest = _source(domain, family)
    lines = [f"# {_title(domain, family)}", "", first, "", rest, ""]
    if figures:
        lines += ["## Measured", "", *_figures(figures), ""]
        commands = [f"manyheads {domain} fit --config {f['config']}" for f in figures if f["config"]]
        lines += ["```sh", *dict.fromkeys(commands), "```", ""]
    lines += ["## Names", ""]
    if len(members) <= MANY:
        for entry in members:
            lines += [
                f"**`{entry.name}`**: {entry.summary}. {entry.paper}; code and weights of its kind: {entry.licence}.",
                "",
                f"`create_model({', '.join(filter(None, [repr(entry.name), arguments(entry)]))})`".replace(
                    "'", '"'
                ),
                "",
            ]
    else:
        papers = sorted({entry.paper for entry in members})
        lines += [
            f"{len(members)} names, of {', '.join(papers)}; `manyheads models show NAME` says more.",
            "",
        ]
        lines += ["| name | paper | licence |", "|---|---|---|"]
        lines += [f"| `{entry.name}` | {entry.paper} | {entry.licence} |" for entry in members]
    module = f"manyheads.{domain}.models.{family}"
    return "\n".join(
        [*lines, "## Source", "", f"::: {module}", "    options:", "      show_root_heading: false", ""]
    )


def _figures(figures: Iterable[dict[str, str]]) -> list[str]:
    lines = ["| model | data | figure | ours | published | config | cost |", "|---|---|---|---|---|---|---|"]
    for f in figures:
        config = f"`{f['config']}`" if f["config"] else ""
        lines.append(
            f"| {f['model']} | {f['data']} | {f['metric']} | {f['ours']} | {f['published']} | {config} | {f['cost']} |"
        )
    return lines


def _overview(figures: Sequence[dict[str, str]]) -> str:
    lines = [
        "# Models",
        "",
        "A name is a family and a variant; `manyheads models list` prints them all. Each family has a page: its paper, what we",
        "measured beside what was published, the command, and the names with their arguments.",
        "",
    ]
    for domain in DOMAINS:
        lines += [f"## {TITLES[domain]}", ""]
        for family, members in families(domain).items():
            names = f"{len(members)} names" if len(members) > 1 else f"`{members[0].name}`"
            lines.append(f"- [{_title(domain, family)}]({domain}/{family}.md): {names}")
        lines += ["", *_figures(f for f in figures if f["family"].startswith(domain + "/")), ""]
    return "\n".join(lines)


def _speed() -> str:
    lines = [
        "# Speed",
        "",
        "Ratios are the peer's median over ours, both in one run on the same numbers and threads: above 1 we are faster. A line",
        "below 1, or one that misses what we asked of it, stands here like the others. `python -m benchmarks TABLE` makes each",
        "table anew on your machine.",
        "",
    ]
    results = ROOT / "benchmarks" / "results"
    for path in sorted({*results.glob("*_cpu.json")} - {*results.glob("jobs_*")}):  # a page of their own
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


def _parity() -> str:
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
    return "\n".join([*lines, ""])


def _faults() -> str:
    results = ROOT / "benchmarks" / "results"
    downloads, inputs = (results / "hub_faults.md").read_text(encoding="utf-8").strip().split("\n\n")[2:]
    kills = json.loads((results / "kills.json").read_text())
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
    for path in sorted(results.glob("jobs_*.json")):
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
