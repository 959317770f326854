"""What `config.json` of a model folder holds, read strictly. Imports no torch.

A config is data: it names a model of our catalogue and plain arguments, never a class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from manyheads.core import catalog
from manyheads.core.errors import ManyheadsError, UsageError, did_you_mean
from manyheads.core.strict_json import Json, Wrong, children, parse

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
RECORD = "manyheads.lock"  # of where a downloaded folder is from; see hub_cache.py
MAX_CONFIG_BYTES = 8 << 20


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` holds.

    Args:
        format_version: The layout of the folder.
        domain: One of the catalogue's domains.
        name: A catalogue name of that domain.
        arguments: Everything that the builder needs; plain values, flat lists of them, or objects of these.
        preprocessing: What the domain's predictor needs beside the model.
        labels: Names of the classes, where there are any.
        training: Figures of the training run.
        weights_sha256: The hash of `model.safetensors`.
    """

    format_version: int
    domain: str
    name: str
    arguments: dict[str, Json]
    preprocessing: dict[str, Json]
    labels: list[str] | None
    training: dict[str, Json]
    weights_sha256: str

    @property
    def identity(self) -> str:
        """A hash of everything here, and so of the weights."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_config(path: str | Path) -> ModelConfig:
    """Read and check the `config.json` of a model folder.

    Raises:
        ManyheadsError: It is missing, too large, not what `save` writes, or names what the catalogue has not.
    """
    file = Path(path) / CONFIG
    try:
        config = _check_config(parse(regular(file).read_bytes()))
        entry = catalog.find(config.name)
        if entry.domain != config.domain:
            raise Wrong(f"{config.name} is a model of {entry.domain}, not of {config.domain}")
    except (Wrong, UsageError) as error:
        raise ManyheadsError(f"{file}: {error}") from error
    return config


def regular(file: Path) -> Path:
    """Refuse links (they may lead out of the folder) and what is not a file."""
    if file.is_symlink():
        raise ManyheadsError(f"{file} is a symbolic link: a model folder holds its files itself")
    if not file.is_file():
        raise ManyheadsError(f"{file.parent} has no {file.name}")
    if file.name == CONFIG and file.stat().st_size > MAX_CONFIG_BYTES:
        raise ManyheadsError(
            f"{file} has {file.stat().st_size} bytes, more than the {MAX_CONFIG_BYTES} allowed"
        )
    return file


def _check_config(parsed: Json) -> ModelConfig:
    if not isinstance(parsed, dict):
        raise Wrong("not an object")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    version = parsed.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise Wrong(f"format_version is {version!r}; this version of manyheads reads {FORMAT_VERSION}")
    for key in parsed:
        if key not in known:
            raise Wrong(f"unknown key {key!r}{did_you_mean(key, known)}")
    for key in known:
        if key not in parsed:
            raise Wrong(f"no key {key!r}")
    for key in ("domain", "name", "weights_sha256"):
        _expect(isinstance(parsed[key], str), key, "a string")
    for key in ("arguments", "preprocessing", "training"):
        _expect(isinstance(parsed[key], dict), key, "an object")
    labels = parsed["labels"]
    strings = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    _expect(labels is None or strings, "labels", "null or a list of strings")
    config = ModelConfig(**cast("dict[str, object]", parsed))  # type: ignore[arg-type]  # checked above
    _expect(config.domain in catalog.DOMAINS, "domain", f"one of {', '.join(catalog.DOMAINS)}")
    _expect(bool(re.fullmatch("[0-9a-f]{64}", config.weights_sha256)), "weights_sha256", "64 hex digits")
    for name, value in config.arguments.items():
        parts = list(value.values()) if isinstance(value, dict) else [value]
        what = "a plain value, a flat list of them, or an object of these"
        _expect(all(map(_is_flat, parts)), f"arguments.{name}", what)
    return config


def _is_flat(value: Json) -> bool:
    return not isinstance(value, dict) and not any(isinstance(each, dict | list) for each in children(value))


def _expect(holds: bool, key: str, what: str) -> None:
    if not holds:
        raise Wrong(f"{key} must be {what}")
