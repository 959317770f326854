"""The model card of a model folder: what it is, what it measured, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import cast

from manyheads.core import catalog

USE = """## Use

```python
import manyheads

predictor = manyheads.load("{use}")
frame = predictor.predict("input.csv")
```

As a batch job that survives being killed:

```
manyheads predict {use} input.csv -o output
```
"""


def write_card(
    config: Mapping[str, object], *, origin: str = "", licence: str = "", use: str = "this/folder"
) -> str:
    """Return the Markdown of `README.md` for a config, the fields of a `ModelConfig`.

    Args:
        config: What it is of.
        origin: Where the weights are from, if others published them.
        licence: Of the weights, where it is known.
        use: What commands in it call the model.

    Raises:
        UsageError: The catalogue has no model of that name.
    """
    entry = catalog.find(str(config["name"]))
    labels = cast("list[str] | None", config["labels"])
    lines = [
        "---",
        "library_name: manyheads",
        *_licence(licence or entry.licence),
        f"tags: [{entry.domain}, {entry.task}]",
        "---",
        "",
        f"# {entry.name}",
        "",
        f"{entry.summary}.",
        "",
        f"- Domain and task: {entry.domain}, {entry.task}",
    ]
    lines += [f"- Paper: {entry.paper}"] if entry.paper else []
    lines += [f"- Weights from: {_cell(origin)}"] if origin else []
    lines += [f"- Licence of the weights: {_cell(licence)}"] if licence else []
    lines += [f"- Licence of the code: {entry.licence}; the training data's own terms hold for the weights"]
    lines += [f"- Labels: {len(labels)}"] if labels else []
    lines += [f"- Weights: `model.safetensors`, SHA-256 `{config['weights_sha256']}`", ""]
    lines += _table("Training", config["training"])
    lines += _table("Arguments", config["arguments"])
    return "\n".join(lines) + "\n" + USE.replace("{use}", use)


def _licence(name: str) -> list[str]:
    """Return the lines of the card's head; a hub knows short names alone."""
    plain = name.lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,40}", plain):
        return [f"license: {plain}"]
    return ["license: other", f"license_name: {json.dumps(_cell(name))}"]


def _table(title: str, values: object) -> list[str]:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in _flat(values)]
    return [f"## {title}", "", "| | |", "|---|---|", *rows, ""] if rows else []


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")[:200]
