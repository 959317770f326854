"""Model folders: `config.json`, `model.safetensors` and `README.md`, written whole and read back strictly.

A config is data: it names a model of our catalogue and plain arguments, never a class. Weights are
safetensors only, their hash is verified before they are read, and every tensor must be used and fit.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from manyheads.core import catalog, files
from manyheads.core.card import write_card
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.fitting import check_buildable, explained, match
from manyheads.core.model_config import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MAX_CONFIG_BYTES,
    RECORD,
    WEIGHTS,
    ModelConfig,
    read_config,
    regular,
)
from manyheads.core.strict_json import Json

if TYPE_CHECKING:
    from torch import nn

    from manyheads.core.predictor import AnyPredictor

__all__ = [
    "CARD",
    "CONFIG",
    "FORMAT_VERSION",
    "MAX_CONFIG_BYTES",
    "WEIGHTS",
    "Json",
    "ModelConfig",
    "check_buildable",
    "find_folder",
    "load",
    "load_model",
    "make_predictor",
    "read_config",
    "save",
]


def save(
    path: str | Path,
    model: nn.Module,
    *,
    domain: str,
    name: str,
    arguments: Mapping[str, object],
    preprocessing: Mapping[str, object],
    labels: list[str] | None = None,
    training: Mapping[str, object] | None = None,
    card: str = "",
) -> ModelConfig:
    """Write a model folder, in place of the model folder that is there.

    The folder is checked as `load_model` would before it gets its name.

    Args:
        path: The folder.
        model: The module; its whole state is saved.
        domain: The model's domain.
        name: Its catalogue name.
        arguments: The builder's arguments, complete enough to build the same module again.
        preprocessing: What the domain's predictor needs.
        labels: Names of the classes.
        training: Figures for the card and the config.
        card: The text of `README.md`; written from the rest when empty.

    Raises:
        ManyheadsError: The arguments do not build this module, or what is at `path` is no model folder.
    """
    path = Path(path)
    if path.exists() and not _is_replaceable(path):
        raise ManyheadsError(f"{path} is there and is no model folder: choose another place or move it away")
    fields = {
        "format_version": FORMAT_VERSION,
        "domain": domain,
        "name": name,
        "arguments": dict(arguments),
        "preprocessing": dict(preprocessing),
        "labels": labels,
        "training": dict(training or {}),
    }
    written = files.temporary(path)
    shutil.rmtree(written, ignore_errors=True)
    try:
        config = _write(written, model, fields, card)
        files.replace_folder(written, path)
    except ManyheadsError as error:
        raise ManyheadsError(str(error).replace(str(written), str(path))) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return config


def _write(folder: Path, model: nn.Module, fields: Mapping[str, object], card: str) -> ModelConfig:
    """Write the files of a model folder, and check them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    content = {**fields, "weights_sha256": files.sha256(folder / WEIGHTS)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner's eyes only
    config = read_config(folder)  # as it will be read: a tuple is a list now, NaN was refused
    match(folder, config)
    (folder / CARD).write_text(card or write_card(dataclasses.asdict(config)), encoding="utf-8")
    return config


def _is_replaceable(path: Path) -> bool:
    """Tell whether a path is an empty folder or one that `save` wrote: nothing else is ever removed."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and {file.name for file in path.iterdir()} <= {CONFIG, WEIGHTS, CARD, RECORD}
    )


def find_folder(reference: str | Path) -> Path:
    """Return the model folder of a reference.

    That is a model folder, the `model/` in a run folder, or one in the cache: of `org/name[@revision]` on a
    hub, or of a catalogue name whose published weights are known. What is not in the cache is downloaded.

    Raises:
        UsageError: No such folder, model or revision, or no weights of that name are known.
        ManyheadsError: It cannot be downloaded, or the cache is damaged.
    """
    path, text = Path(reference), str(reference)
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if path.exists():
        raise UsageError(f"{path} is no model folder: it has no {CONFIG}")
    from manyheads.core import pull, references

    if text in catalog.list_models():
        return pull.locate(*pull.of_catalogue(text))
    found = references.parse(text)
    if found is None:
        raise UsageError(f"no model folder {reference}")
    return pull.locate(found)


def load_model(path: str | Path) -> tuple[nn.Module, ModelConfig]:
    """Build the model of a folder, in evaluation mode, with the folder's weights and nothing else.

    Raises:
        ManyheadsError: The config does not check, the weights are not those it names, or a tensor is missing,
            left over, or of another shape or type.
    """
    from safetensors.torch import load_file

    path = Path(path)
    config = read_config(path)
    weights = regular(path / WEIGHTS)
    if files.sha256(weights) != config.weights_sha256:
        raise ManyheadsError(
            f"{weights} is not the file that {CONFIG} names (SHA-256 differs): damaged or replaced"
        )
    match(path, config)
    with explained(path):
        model = catalog.create_model(config.name, **config.arguments)
        model.load_state_dict(load_file(str(weights)), strict=True)
    return model.eval(), config


def load(reference: str | Path) -> AnyPredictor:
    """Load a model folder, or the `model/` of a run folder, as its domain's predictor.

    Raises:
        UsageError: There is no such folder.
        ManyheadsError: The folder does not check.

    Example:
        >>> load("quickstart/model").predict("file.csv")  # doctest: +SKIP
    """
    return make_predictor(*load_model(find_folder(reference)))


def make_predictor(model: nn.Module, config: ModelConfig) -> AnyPredictor:
    """Return the predictor of a loaded model: that of its task, as the domain's catalogue says."""
    task = catalog.tasks(config.domain)[catalog.find(config.name).task]
    return cast("AnyPredictor", catalog.load_class(task.predictor).from_folder(model, config))  # type: ignore[attr-defined]
