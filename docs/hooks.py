"""Pages that are made of data: a page a family of models, speed, parity, and the reference.

mkdocs calls `on_config` and `on_files`. Everything stands in the repository: the catalogue, `docs/figures.yaml`,
`benchmarks/results`; a page that is out of date can only be an old build.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from measured import faults, parity, speed, tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from manyheads.apps.options import configs, resolve_config
from manyheads.core.catalog import DOMAINS, Entry, arguments, entries
from manyheads.core.datasets import DataSet, datasets

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
    "Ops": (),  # the functions of manyheads.core.ops, below
    "Layers": tuple(
        f"manyheads.core.layers.{name}"
        for name in ("attention", "norm", "mlp", "positions", "mamba", "mamba2", "hydra", "deltanet", "s4")
    ),
    "Catalogue and model folders": ("manyheads.core.catalog", "manyheads.core.hub"),
    "Predictors and jobs": ("manyheads.core.predictor", "manyheads.apps.jobs"),
    "Proof": ("manyheads.core.testing", "manyheads.core.dispatch"),
    "Errors": ("manyheads.core.errors",),
}
HOW_TO = ("own-data", "data-sets", "own-model", "jobs", "clusters", "hub", "serving", "export", "gpu")
TRAININGS = "../../measured/graph_training.md"
MANY = 24  # models of a family that are listed with their arguments; of more, the names alone
ANY_SIZE = {"cct", "vim"}  # names whose size is the caller's
NOT_MEASURED = (
    "Not trained here: it enters by [parity](../../parity.md), the original's weights, outputs and gradients. Trained and"
    " tested like the others, with a [config of yours](../../how-to/own-model.md)."
)
DATA_SETS = (
    "`manyheads data list` prints these with the place where each is on this machine, `manyheads data get NAME` fetches one.",
    "What is **downloaded** is verified by its checksum and kept in the cache. What comes **by hand** has no address with a known",
    "checksum, or a licence under which its owner wants to be asked: fetch it from where the line says, put it below a folder under",
    "the name that is given (`.gz` is read, too), and name the folder in `MANYHEADS_DATA` (several: separated by colons):",
    "",
    "```sh",
    "export MANYHEADS_DATA=~/data # with ~/data/recsys/ml-100k/u.data, and so on",
    "manyheads data get ml_100k   # prints where it was found",
    "```",
)
WRAPPERS = {  # tasks in which the network that a config names is one part of the model
    "classification": "classifier",
    "imputation": "reconstructor",
    "anomaly": "reconstructor",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation: what is written by hand, and what is made here."""
    config.nav = [
        {"Start": "index.md"},
        {"Tutorials": [{TITLES[d]: f"tutorials/{d}.md"} for d in DOMAINS]},
        {"How to": [f"how-to/{name}.md" for name in HOW_TO]},
        {"Models": ["models/index.md", *({TITLES[d]: _family_pages(d)} for d in DOMAINS)]},
        {
            "Measured": [
                {"Speed": "speed.md"},
                {"Parity": "parity.md"},
                {"Faults and jobs": "faults.md"},
                *(f"measured/{p.name}" for p in tables()),
            ]
        },
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
    yield "how-to/data-sets.md", _data_sets()
    yield "speed.md", speed()
    yield "parity.md", parity()
    yield "faults.md", faults()
    for path in tables():
        yield f"measured/{path.name}", path.read_text(encoding="utf-8")
    for title, modules in PUBLIC.items():
        shown = modules or _ops()
        yield _reference_page(title), "\n\n".join([f"# {title}", *(f"::: {name}" for name in shown)]) + "\n"


def _data_sets() -> str:
    origins = yaml.safe_load((ROOT / "docs" / "origins.yaml").read_text(encoding="utf-8"))
    lines = ["# Data sets", "", *DATA_SETS]
    for domain in DOMAINS:
        lines += ["", f"## {TITLES[domain]}", ""]
        for each in datasets(domain):
            lines += [
                f"**`{each.name}`**: {each.summary}. Licence: {each.licence}. {_place(each, origins)}",
                "",
            ]
    return "\n".join(lines)


def _place(dataset: DataSet, origins: Mapping[str, str]) -> str:
    """How a data set comes to be here."""
    first = dataset.files[0]
    if first.embedded:
        return "Ships with the package."
    if all(file.address for file in dataset.files):
        return f"Downloaded: {dataset.size / 1e6:.1f} MB."
    columns = f" Columns: `{', '.join(dataset.columns)}`." if first.path.endswith(".csv") else ""
    return f"By hand, `{first.path}`: {origins[dataset.name]}.{columns}"


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


def _ops() -> list[str]:
    """The public functions of the core, each where it is defined: its folder has the same name."""
    tree = ast.parse((ROOT / "core" / "ops" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{alias.name}" for node in imports for alias in node.names]


def _source(domain: str, family: str) -> tuple[str, str]:
    """The first line of a family's file, and what follows it."""
    text = (ROOT / domain / "models" / f"{family}.py").read_text(encoding="utf-8")
    first, _, rest = (ast.get_docstring(ast.parse(text)) or family).partition("\n")
    return first, rest.strip()


def _title(domain: str, family: str) -> str:
    return re.split(r"[:,;]| on torch-geometric", _source(domain, family)[0])[0].rstrip(".")


def _family(domain: str, family: str, members: Sequence[Entry], figures: Sequence[dict[str, str]]) -> str:
    first, rest = _source(domain, family)
    lines = [f"# {_title(domain, family)}", "", _linked(first), "", _linked(rest), "", "## Measured", ""]
    shown = [name for name in configs(domain) if _family_of(domain, name) == family]
    trainings = (ROOT / "benchmarks" / "results" / "graph_training.md").read_text(encoding="utf-8")
    compared = [entry.name for entry in members if f" {entry.name} |" in trainings]
    if figures:
        lines += _figures(figures)
    elif not shown and not compared:
        lines.append(NOT_MEASURED)
    if compared:
        lines += [
            "",
            f"{', '.join(f'`{name}`' for name in compared)}: [trainings beside others]({TRAININGS}).",
        ]
    for name in shown:
        lines += ["", *_config(domain, name)]
    lines += ["", "## Names", ""]
    sizes = _sizes()
    if len(members) <= MANY:
        for entry in members:
            lines += [_about(entry, sizes.get(entry.name)), "", "```python", _call(entry), "```", ""]
    else:
        lines += [f"{len(members)} names; `manyheads models show NAME` says more.", ""]
        lines += ["| name | parameters | paper | licence of the code |", "|---|---|---|---|"]
        lines += [
            f"| `{entry.name}` | {sizes.get(entry.name, '')} | {_linked(entry.paper)} | {entry.licence} |"
            for entry in members
        ]
    module = f"manyheads.{domain}.models.{family}"
    return "\n".join(
        [
            *lines,
            "",
            "## Reference",
            "",
            f"::: {module}",
            "    options:",
            "      show_root_heading: false",
            "",
        ]
    )


def _linked(text: str) -> str:
    """Papers as links."""
    return re.sub(r"\barXiv\s(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _about(entry: Entry, size: str | None) -> str:
    """What an entry is, in sentences."""
    paper = "" if entry.paper in {"", "none"} else f" Paper: {_linked(entry.paper)}."
    parameters = f" {size} parameters." if size and "parameters" not in entry.summary else ""
    return f"**`{entry.name}`**: {entry.summary}.{parameters}{paper} Licence of the code: {entry.licence}."


def _call(entry: Entry) -> str:
    """How an entry is built: its arguments, those that have a default with it."""
    given = arguments(entry)
    call = f"create_model({', '.join(filter(None, [repr(entry.name), given]))})".replace("'", '"')
    if len(call) <= 90:
        return call
    parts = re.split(r", (?=\w+: )", given.replace("'", '"'))
    return "\n".join([f'create_model("{entry.name}",', *(f"    {part}," for part in parts), ")"])


def _sizes() -> dict[str, str]:
    """Numbers of parameters, of the names that were compared with an original."""
    found = {}
    for domain in ("vision", "speech"):
        rows = json.loads((ROOT / f"benchmarks/results/parity_{domain}.json").read_text())["rows"]
        found |= {row["name"]: f"{row['parameters']:,}" for row in rows if row["name"] not in ANY_SIZE}
    return found


def _family_of(domain: str, config: str) -> str:
    """The family whose page a shipped config stands on."""
    content = yaml.safe_load(resolve_config(domain, config).read_text(encoding="utf-8"))
    if domain == "timeseries" and content.get("task") in WRAPPERS:
        return WRAPPERS[content["task"]]
    if content["model"].get("output", "point") == "quantile":
        return "forecaster"
    of = {entry.name: family for family, members in families(domain).items() for entry in members}
    return of[content["model"]["name"]]


def _config(domain: str, name: str) -> list[str]:
    """A config's commands and what they gave, which are its first lines."""
    text = resolve_config(domain, name).read_text(encoding="utf-8")
    head = [line[2:] for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    commands = [i for i, line in enumerate(head) if line.startswith(("manyheads ", "python ", "    "))]
    shown = "\n".join(head[i] for i in commands).replace("\n    ", " \\\n    ")
    said = " ".join(line for i, line in enumerate(head) if i not in commands and not line.startswith("|"))
    return [f"### `{name}`", "", "```sh", shown, "```", "", _linked(said)]


def _figures(figures: Iterable[Mapping[str, str]]) -> list[str]:
    lines = [
        "| model | data | ours | published | parameters | cost | config |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        config = f"`{f['config']}`" if f["config"] else ""
        lines.append(
            f"| {f['model']} | {f['data']} | {f['metric']} {f['ours']} | {f['published']} | {f['parameters']} |"
            f" {f['cost']} | {config} |"
        )
    return lines


def _overview(figures: Sequence[dict[str, str]]) -> str:
    lines = [
        "# Models",
        "",
        "A name is a family and a variant; `manyheads models list` prints them all. Each family has a page: its paper, what we",
        "measured beside what was published (where we found a figure of the same size on the same data), the commands, the sizes,",
        "and the names with their arguments. A weight file has four bytes a parameter.",
        "",
    ]
    for domain in DOMAINS:
        lines += [f"## {TITLES[domain]}", ""]
        for family, members in families(domain).items():
            names = f"{len(members)} names" if len(members) > 1 else f"`{members[0].name}`"
            lines.append(f"- [{_title(domain, family)}]({domain}/{family}.md): {names}")
        lines += ["", *_figures(f for f in figures if f["family"].startswith(domain + "/")), ""]
    return "\n".join(lines)
