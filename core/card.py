"""The model card of a model folder: what it is, what it measured, how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from manyheads.core import catalog

USE = """## Use

```python
import manyheads

predictor = manyheads.load("this/folder")
frame = predictor.predict("input.csv")
```

As a batch job that survives being killed:

```
manyheads predict this/folder input.csv -o output
```
"""


def write_card(config: Mapping[str, object]) -> str:
    """Return the Markdown of `README.md` for a config, the fields of a `ModelConfig`.

    Raises:
        UsageError: The catalogue has no model of that name.
    """
    entry = catalog.find(str(config["name"]))
    labels = cast("list[str] | None", config["labels"])
    lines = [
        "---",
        "library_name: manyheads",
        f"license: {entry.licence.lower()}",
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
    lines += [f"- Licence of the code: {entry.licence}; the training data's own terms hold for the weights"]
    lines += [f"- Labels: {len(labels)}"] if labels else []
    lines += [f"- Weights: `model.safetensors`, SHA-256 `{config['weights_sha256']}`", ""]
    lines += _table("Training", config["training"])
    lines += _table("Arguments", config["arguments"])
    return "\n".join(lines) + "\n" + USE


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
