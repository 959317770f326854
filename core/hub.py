"""Model folders: `config.json`, `model.safetensors` and `README.md`, written whole and read back strictly.

A config is data: it names a model of our catalogue and plain arguments, never a class. Weights are
safetensors only, their hash is verified before they are read, and every tensor must be used and fit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from manyheads.core import catalog, files
from manyheads.core.card import write_card
from manyheads.core.errors import ManyheadsError, UsageError
from manyheads.core.model_config import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MAX_CONFIG_BYTES,
    WEIGHTS,
    ModelConfig,
    read_config,
    regular,
)
from manyheads.core.strict_json import Json

if TYPE_CHECKING:
    import torch
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
    "find_folder",
    "load",
    "load_model",
    "make_predictor",
    "read_config",
    "save",
]
SHOWN = 3  # names listed in a message
SPARE = 1000  # parameters that a builder may register beside those it keeps


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
    _match(folder, config)
    (folder / CARD).write_text(card or write_card(dataclasses.asdict(config)), encoding="utf-8")
    return config


def _is_replaceable(path: Path) -> bool:
    """Tell whether a path is an empty folder or one that `save` wrote: nothing else is ever removed."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and {file.name for file in path.iterdir()} <= {CONFIG, WEIGHTS, CARD}
    )


def find_folder(reference: str | Path) -> Path:
    """Return the model folder of a reference: that folder, or the `model/` in a run folder.

    Raises:
        UsageError: No such folder; catalogue names and hub references have no weights in this version.
    """
    path = Path(reference)
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if path.exists():
        raise UsageError(f"{path} is no model folder: it has no {CONFIG}")
    if str(reference) in catalog.list_models():
        domain = catalog.find(str(reference)).domain
        raise UsageError(
            f"{reference} is a catalogue name, and this version reads model folders only:"
            f" train one first (`manyheads quickstart`, `manyheads {domain} fit`)"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", str(reference)):
        raise UsageError(f"no folder {reference}; this version reads model folders only, not hub references")
    raise UsageError(f"no model folder {reference}")


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
    _match(path, config)
    with _explained(path):
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


def _match(path: Path, config: ModelConfig) -> None:
    """Compare the names, shapes and types of the file with those of the module, before anything is allocated.

    The header is all that is read; the module is built without memory behind its tensors.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    file = path / WEIGHTS
    try:
        with safe_open(str(file), framework="pt") as opened:
            stored = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
            found = {key: (each.get_dtype(), tuple(each.get_shape())) for key, each in stored.items()}
    except SafetensorError as error:
        raise ManyheadsError(f"{file} is no safetensors file ({error})") from error
    with _explained(path), _at_most(SPARE + 2 * len(found)), torch.device("meta"):
        wanted = catalog.create_model(config.name, **config.arguments).state_dict()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    differing = [
        f"{key} is {_describe(*found[key])}, not {_describe(_code(value.dtype), tuple(value.shape))}"
        for key, value in wanted.items()
        if key in found and found[key] != (_code(value.dtype), tuple(value.shape))
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("missing", missing), ("left over", unexpected), ("of another kind", differing))
        if names
    ]
    if faults:
        raise ManyheadsError(f"{file} does not fit {config.name}: tensors {'; '.join(faults)}")


@contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Stop building a module at so many parameters: a config may ask for a billion layers."""
    from torch.nn.modules.module import register_module_parameter_registration_hook as register

    thread, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError("they make many more parameters than the weights have")

    hook = register(counted)
    try:
        yield
    finally:
        hook.remove()


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _code(dtype: torch.dtype) -> str:
    """Return safetensors' name of a type."""
    name = str(dtype).removeprefix("torch.")
    if name in ("bool", "bfloat16"):
        return {"bool": "BOOL", "bfloat16": "BF16"}[name]
    return re.sub(r"^(f|i|u|c)\D*", lambda match: match[1].upper(), name)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a builder's refusal of a config's arguments into an error that names the file."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise ManyheadsError(f"{path / CONFIG}: the arguments build no model: {message}") from error
