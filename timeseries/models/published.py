"""Published weights of forecasters, made our model folders.

A state dict says neither which model it is of nor its sizes, and no published file says how values were
scaled: the folder's preprocessing stays empty, so `predict` refuses it, and the model is used in Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn

from manyheads.core import hub
from manyheads.core.catalog import create_model, list_models
from manyheads.core.errors import UsageError
from manyheads.core.strict_json import Wrong, parse
from manyheads.core.weights import read_tensors
from manyheads.timeseries.models import checkpoints, smamba
from manyheads.timeseries.models.inverted import InvertedForecaster
from manyheads.timeseries.models.pretrained import from_transformers

MAX_CONFIG_BYTES = 1 << 20


def convert_transformers(
    published: str | Path, folder: str | Path, *, compat: str = "alone"
) -> hub.ModelConfig:
    """Write a model folder from one of the transformers library.

    Args:
        published: As `from_transformers` takes it.
        folder: The model folder to write.
        compat: As `from_transformers`.

    Raises:
        DataError: As `from_transformers`.
    """
    model, name, arguments = from_transformers(published, compat)
    return _save(folder, model, name, cast("dict[str, object]", arguments), Path(published), "transformers")


def convert_informer(
    published: str | Path, folder: str | Path, *, name: str, arguments: str
) -> hub.ModelConfig:
    """Write a model folder from a checkpoint of Informer's authors; see `_convert`."""
    return _convert(published, folder, name, arguments, "informer")


def convert_autoformer(
    published: str | Path, folder: str | Path, *, name: str, arguments: str
) -> hub.ModelConfig:
    """Write a model folder from a checkpoint of Autoformer's authors; see `_convert`."""
    return _convert(published, folder, name, arguments, "autoformer")


def convert_time_series_library(
    published: str | Path, folder: str | Path, *, name: str, arguments: str
) -> hub.ModelConfig:
    """Write a model folder from a checkpoint of the time-series library; see `_convert`."""
    return _convert(published, folder, name, arguments, "library")


def convert_s_mamba(
    published: str | Path, folder: str | Path, *, arguments: str, name: str = "s_mamba"
) -> hub.ModelConfig:
    """Write a model folder from a checkpoint of S-Mamba's authors; see `_convert`."""
    return _convert(published, folder, name, arguments, "s-mamba")


def _convert(
    published: str | Path, folder: str | Path, name: str, arguments: str, dialect: str
) -> hub.ModelConfig:
    """Write a model folder from a state dict.

    Args:
        published: The file.
        folder: The model folder to write.
        name: The model's catalogue name.
        arguments: The builder's, as a JSON object or the path of a file with one; what a dialect asks for
            beside them is filled in.
        dialect: Whose code it is from.

    Raises:
        UsageError: No such model, or arguments that it does not take.
        DataError: The weights are not exactly that model's.
    """
    published = Path(published)
    if name not in list_models("timeseries"):
        raise UsageError(f"no forecaster {name!r} (`manyheads models list --domain timeseries`)")
    given = _read_arguments(arguments)
    state = read_tensors(published, ("model", "state_dict", "model_state_dict"))
    hub.check_buildable(name, given, published)
    model = create_model(name, **given)
    if dialect == "s-mamba":
        if not isinstance(model, InvertedForecaster):
            raise UsageError(f"{name} is no s_mamba")
        smamba.load_official_weights(model, state)
        return _save(folder, model, name, given, published, dialect)
    wanted = checkpoints.DIALECTS.get(type(model), {}).get(dialect, {})
    given = {key: values[0] for key, values in wanted.items()} | given
    model = create_model(name, **given)
    if type(model) not in checkpoints.DIALECTS:
        raise UsageError(f"{name} is not published in this dialect")
    checkpoints.load_weights(cast(checkpoints.Loadable, model), state, dialect)
    return _save(folder, model, name, given, published, dialect)


def _read_arguments(text: str) -> dict[str, object]:
    content = str(text).encode()
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise UsageError(f"arguments: {text[:80]!r} is neither a JSON object nor a file of one")
        content = path.read_bytes()
    try:
        found = parse(content)
    except Wrong as error:
        raise UsageError(f"arguments: {error}") from error
    if not isinstance(found, dict):
        raise UsageError("arguments: not a JSON object")
    return cast("dict[str, object]", found)


def _save(
    folder: str | Path,
    model: nn.Module,
    name: str,
    arguments: dict[str, object],
    published: Path,
    dialect: str,
) -> hub.ModelConfig:
    return hub.save(
        folder,
        model,
        domain="timeseries",
        name=name,
        arguments=arguments,
        preprocessing={},
        training={"converted_from": published.name, "dialect": dialect},
    )
