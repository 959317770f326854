"""Whether the weights of a model folder are those of its model: seen before anything is allocated."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.core import catalog
from manyheads.core.errors import DataError, ManyheadsError
from manyheads.core.model_config import CONFIG, WEIGHTS, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

SHOWN = 3  # names listed in a message
SPARE = 1000  # parameters that a builder may register beside those it keeps


def stored_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of every tensor in a safetensors file, from its header.

    Raises:
        ManyheadsError: It is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as opened:
            stored = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
            return {key: (each.get_dtype(), tuple(each.get_shape())) for key, each in stored.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ManyheadsError(f"{file} is no safetensors file ({error})") from error


def match(path: Path, config: ModelConfig) -> None:
    """Compare the names, shapes and types of a folder's weights with those of its config's model.

    The header is all that is read; the module is built without memory behind its tensors.

    Raises:
        ManyheadsError: The config builds no model, or another one; says what differs.
    """
    import torch

    found = stored_tensors(path / WEIGHTS)
    with explained(path), _at_most(SPARE + 2 * len(found)), torch.device("meta"):
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
        raise ManyheadsError(f"{path / WEIGHTS} does not fit {config.name}: tensors {'; '.join(faults)}")


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
def explained(path: Path) -> Iterator[None]:
    """Turn a builder's refusal of a config's arguments into an error that names the file."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise ManyheadsError(f"{path / CONFIG}: the arguments build no model: {message}") from error


def check_buildable(name: str, arguments: Mapping[str, object], weights: Path) -> None:
    """Refuse arguments that ask for a much larger model than a file of weights could be of.

    A converter calls it before it builds a model that somebody's config describes.

    Raises:
        DataError: They build no model, or one that is too large.
    """
    import torch

    most = 2 * weights.stat().st_size + (1 << 20)  # numbers; of half a byte each at the least
    try:
        with _at_most(max(SPARE, most // 64)), torch.device("meta"):
            asked = sum(
                each.numel() for each in catalog.create_model(name, **arguments).state_dict().values()
            )
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise DataError(f"{weights.name}: the config beside it builds no {name}: {message}") from error
    if asked > most:
        raise DataError(f"{weights.name} is too small for the {asked:,} numbers of this {name}")
