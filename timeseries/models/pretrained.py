"""Checkpoint folders of the transformers library: its Informer and Autoformer for prediction.

A folder's `config.json` is data: its numbers become arguments of our builders, and no class in it is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.catalog import create_model
from manyheads.core.errors import DataError, ManyheadsError
from manyheads.core.weights import read_tensors
from manyheads.timeseries.models.checkpoints import load_weights
from manyheads.timeseries.models.lagged_autoformer import LaggedAutoformer
from manyheads.timeseries.models.lagged_informer import LaggedInformer

_MOST_BYTES = 1 << 20  # of a config
_MOST = 1 << 20  # of a number in it: what is larger is no size of a model
_MOST_LAYERS = 256

Value = bool | int | float | str | None | list[int]

# Their key, ours, and its kind.
_SHARED: tuple[tuple[str, str, str], ...] = (
    ("prediction_length", "pred_len", "size"),
    ("input_size", "enc_in", "size"),
    ("num_time_features", "time_features", "count"),
    ("num_dynamic_real_features", "future", "count"),
    ("num_static_real_features", "static", "count"),
    ("d_model", "d_model", "size"),
    ("encoder_attention_heads", "n_heads", "size"),
    ("decoder_attention_heads", "dec_heads", "size"),
    ("encoder_layers", "e_layers", "layers"),
    ("decoder_layers", "d_layers", "layers"),
    ("encoder_ffn_dim", "d_ff", "size"),
    ("decoder_ffn_dim", "dec_ff", "size"),
    ("dropout", "dropout", "probability"),
    ("attention_dropout", "attention_dropout", "probability"),
    ("activation_dropout", "activation_dropout", "probability"),
    ("encoder_layerdrop", "enc_layerdrop", "probability"),
    ("decoder_layerdrop", "dec_layerdrop", "probability"),
    ("num_parallel_samples", "num_samples", "size"),
    ("activation_function", "activation", "name"),
    ("distribution_output", "output", "name"),
)
_OWN: dict[str, tuple[tuple[str, str, str], ...]] = {
    "informer": (
        ("sampling_factor", "factor", "size"),
        ("attention_type", "attn", "name"),
        ("distil", "distil", "switch"),
    ),
    "autoformer": (
        ("autocorrelation_factor", "factor", "size"),
        ("label_length", "label_len", "size"),
        ("moving_average", "moving_avg", "size"),
    ),
}
# What would change the computation, and is not built here, unless it has this value.
_FIXED: dict[str, Value] = {
    "loss": "nll",
    "minimum_scale": None,
    "default_scale": None,
    "scaling_dim": 1,
    "keepdim": True,
}


class Pretrained(NamedTuple):
    """A model, and what it is built from: `create_model(name, **arguments)` has the same parameters."""

    model: LaggedInformer | LaggedAutoformer
    name: str
    arguments: dict[str, Value]


def from_transformers(folder: str | Path, compat: str = "alone") -> Pretrained:
    """Load a folder that `InformerForPrediction.save_pretrained` or Autoformer's wrote.

    Args:
        folder: Holds `config.json` and `model.safetensors` (or `pytorch_model.bin`, of which tensors alone
            are read).
        compat: "alone" forecasts each series as the library does if nothing else is in its batch;
            "transformers" is the library with its faults; "none" attends as Autoformer's paper says.

    Returns:
        The model, in evaluation mode.

    Raises:
        DataError: The folder, its config or its weights are not those of such a model.

    Example:
        >>> model, name, arguments = from_transformers("informer-tourism-monthly")
        >>> hub.save("tourism", model, domain="timeseries", name=name, arguments=arguments, preprocessing=...)
    """
    folder = Path(folder)
    name, arguments = builder_arguments(_read_config(folder / "config.json"))
    arguments["compat"] = compat
    state = _read_weights(folder)
    try:
        with torch.device("meta"):  # what does not fit is refused before memory is taken for it
            shapes = create_model(name, **arguments).state_dict()
        _check_size(shapes, state)
        model = create_model(name, **arguments)
    except ManyheadsError as error:
        raise DataError(f"{folder}: {error}") from error
    assert isinstance(model, LaggedInformer | LaggedAutoformer)
    load_weights(model, state, "transformers")
    return Pretrained(model.eval(), name, arguments)


def builder_arguments(config: Mapping[str, object]) -> tuple[str, dict[str, Value]]:
    """Turn a config of the transformers library into a catalogue name and its arguments.

    Args:
        config: What `config.json` holds; a key that is missing has the library's default.

    Raises:
        DataError: A value is none that such a model has, or asks for what is not built here.
    """
    kind = config.get("model_type")
    if kind not in _OWN:
        raise DataError(f"model_type is {kind!r}, not one of {', '.join(_OWN)}")
    for key, fixed in _FIXED.items():
        if config.get(key, fixed) != fixed:
            raise DataError(f"{key}={config[key]!r} is not built here")
    table = (*_SHARED, *_OWN[str(kind)])
    arguments = {ours: _checked(config, theirs, what) for theirs, ours, what in table if theirs in config}
    if "pred_len" not in arguments:
        raise DataError("there is no prediction_length")
    lags = _list(config, "lags_sequence") or list(range(1, 8))
    context = config.get("context_length") or arguments["pred_len"]
    context = _checked({"context_length": context}, "context_length", "size")
    assert isinstance(context, int)
    arguments |= {"lags": lags, "seq_len": context + max(lags), "scaling": _scaling(config)}
    arguments.setdefault("time_features", 0)
    if config.get("num_static_categorical_features"):
        arguments["static_categories"] = _list(config, "cardinality")
        arguments["embedding_dims"] = _list(config, "embedding_dimension")
    wanted, given = config.get("num_static_categorical_features") or 0, arguments.get("static_categories")
    if wanted != (len(given) if isinstance(given, list) else 0):
        raise DataError(f"num_static_categorical_features is {wanted!r}, and cardinality {given!r}")
    return f"{kind}_lagged", arguments


def _scaling(config: Mapping[str, object]) -> str:
    scaling = config.get("scaling", "mean")
    if scaling is True:
        return "mean"
    if scaling is None or scaling is False:
        return "none"
    if scaling not in ("mean", "std"):
        raise DataError(f"scaling is {scaling!r}, not mean, std or none")
    return str(scaling)


def _checked(config: Mapping[str, object], key: str, what: str) -> Value:
    value = config[key]
    whole = type(value) is int
    fits = {
        "size": whole and 1 <= value <= _MOST,  # type: ignore[operator]
        "count": whole and 0 <= value <= _MOST,  # type: ignore[operator]
        "layers": whole and 1 <= value <= _MOST_LAYERS,  # type: ignore[operator]
        "probability": type(value) in (int, float) and 0 <= value < 1,  # type: ignore[operator]
        "switch": type(value) is bool,
        "name": type(value) is str,
    }
    if not fits[what]:
        raise DataError(f"{key} is {str(value)[:40]!r}, which is no {what} that such a model has")
    return value  # type: ignore[return-value]


def _list(config: Mapping[str, object], key: str) -> list[int] | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= 1024:
        raise DataError(f"{key} is {str(value)[:40]!r}, not a list of numbers")
    for each in value:
        _checked({key: each}, key, "size")
    return value


def _read_config(file: Path) -> Mapping[str, object]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise DataError(f"{file} has more than {_MOST_BYTES} bytes: it is no config")
        parsed = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}); give a folder with config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{file} is not an object")
    return parsed


def _read_weights(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not safe.is_file() and not pickled.is_file():
        raise DataError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    return read_tensors(safe if safe.is_file() else pickled)


def _check_size(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse a config that asks for much more than the weights hold, before it is built."""
    most = 2 * sum(each.numel() for each in state.values()) + (1 << 20)
    asked = sum(each.numel() for each in wanted.values())
    if asked > most:
        raise DataError(f"config.json asks for {asked:,} numbers, and the weights are {most // 2:,} at most")
