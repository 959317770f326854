"""Weights of other people's Informer, Autoformer and PatchTST, loaded strictly.

The same model has been published in several dialects: "informer" is the code of Informer's authors,
"autoformer" that of Autoformer's authors and of papers that took it over, "library" the time-series library,
"transformers" the library of that name, whose models are others and whose folders `pretrained.py` reads.
Some dialects have the same keys and compute different things, so the caller says which one it is, and a model
built for another is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyheads.core.errors import DataError, UsageError
from manyheads.core.weights import check_fit
from manyheads.timeseries.models.attention import AutoCorrelation
from manyheads.timeseries.models.autoformer import Autoformer
from manyheads.timeseries.models.embeddings import sinusoid
from manyheads.timeseries.models.informer import Informer
from manyheads.timeseries.models.informer_layers import DecoderLayer, DistilLayer, EncoderLayer
from manyheads.timeseries.models.lagged_autoformer import LaggedAutoformer
from manyheads.timeseries.models.lagged_informer import LaggedInformer
from manyheads.timeseries.models.patchtst import PatchTST

Loadable = Informer | Autoformer | PatchTST | LaggedInformer | LaggedAutoformer
Switches = Mapping[str, tuple[str | int | bool, ...]]

_COPIED: Switches = {
    "head_layout": ("scrambled",),
    "distil_padding": (2,),
    "cross_attention": ("prob",),
    "embed_bias": (False,),
}
_ORIGINAL: Switches = {
    "head_layout": ("mix_decoder", "ordered"),
    "distil_padding": (1,),
    "cross_attention": ("full",),
    "embed_bias": (True,),
}
# What a model must be built with, by its class and dialect.
DIALECTS: dict[type[nn.Module], dict[str, Switches]] = {
    Informer: {"informer": _ORIGINAL, "autoformer": _COPIED, "library": _COPIED},
    Autoformer: {"autoformer": {"even_lags": (False,)}, "library": {"even_lags": (True,)}},
    PatchTST: {"library": {}},
    LaggedInformer: {"transformers": {}},
    LaggedAutoformer: {"transformers": {}},
}

# Keys that only one origin has: its class, its dialects, and how it is called in a message.
_ORIGINS: tuple[tuple[tuple[str, ...], tuple[type[nn.Module] | None, tuple[str, ...], str]], ...] = (
    (("encoder.norm.layernorm.weight",), (Autoformer, ("autoformer", "library"), "an Autoformer")),
    (("patch_embedding.value_embedding.weight",), (PatchTST, ("library",), "the library's PatchTST")),
    (("encoder.attn_layers.0.attention_r.A_log",), (None, (), "an S-Mamba (smamba.load_official_weights)")),
    (("enc_embedding.value_embedding.weight",), (None, (), "an iTransformer")),
    (("decoder.projection.weight",), (Informer, ("autoformer", "library"), "a copied Informer")),
    (("projection.weight", "decoder.norm.weight"), (Informer, ("informer",), "its authors' Informer")),
    (
        ("parameter_projection.proj.0.weight", "model.decoder.seasonality_projection.weight"),
        (LaggedAutoformer, ("transformers",), "transformers' Autoformer (autoformer_lagged)"),
    ),
    (
        ("parameter_projection.proj.0.weight", "model.decoder.value_embedding.value_projection.weight"),
        (LaggedInformer, ("transformers",), "transformers' Informer (informer_lagged)"),
    ),
    (("parameter_projection.proj.0.weight",), (None, (), "another forecaster of transformers")),
)
# How the transformers library's keys begin, and ours.
_TRANSFORMERS = (
    ("model.embedder.embedders.", "window.embedders."),
    ("model.decoder.seasonality_projection.", "seasonality_projection."),
    ("model.encoder.", "encoder."),
    ("model.decoder.", "decoder."),
)


def load_weights(model: Loadable, state: Mapping[str, Tensor], dialect: str) -> None:
    """Load a checkpoint of another code; every key is used and every shape checked before any is copied.

    Sinusoid tables, which are no weights, are compared with ours and left out. The prefix `module.`, which
    training on several devices leaves, is taken off.

    Args:
        model: Receives the weights.
        state: The checkpoint's state dict.
        dialect: Whose code it is from: "informer", "autoformer", "library", "transformers"; see the module.

    Raises:
        UsageError: The model is not known in this dialect, or is built for another.
        DataError: The checkpoint is another model's or dialect's, or its keys or shapes are not the model's.

    Example:
        >>> model = informer(96, 96, 7, head_layout="scrambled", distil_padding=2, cross_attention="prob",
        ...                  embed_bias=False)
        >>> state = torch.load("checkpoint.pth", weights_only=True)
        >>> load_weights(model, state, "library")
    """
    name = type(model).__name__
    dialects = DIALECTS[type(model)]
    if dialect not in dialects:
        raise UsageError(f"{name} has no dialect {dialect!r} ({', '.join(dialects)})")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    _check_origin(type(model), state, dialect)
    _check_switches(model, dialect)
    tables = {key: value for key, value in state.items() if key.endswith("position_embedding.pe")}
    for key, table in tables.items():
        _check_table(key, table)
    rest = {key: value for key, value in state.items() if key not in tables}
    if isinstance(model, Informer):
        rest = {key.replace("decoder.projection.", "projection."): value for key, value in rest.items()}
    if dialect == "transformers":
        rest = {our_key(key): value for key, value in rest.items()}
    check_fit(model, rest, name)
    model.load_state_dict(rest, strict=True)


def our_key(key: str) -> str:
    """Return what a parameter of the transformers library is called here."""
    for theirs, ours in _TRANSFORMERS:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _check_origin(wanted: type[nn.Module], state: Mapping[str, Tensor], dialect: str) -> None:
    fitting = [origin for keys, origin in _ORIGINS if all(key in state for key in keys)]
    if not fitting:
        raise DataError(f"these are no weights of {wanted.__name__} in any dialect that is known here")
    found, dialects, called = fitting[0]
    fits = " or ".join(f'"{each}"' for each in dialects)
    if found is not wanted:
        where = "" if found is None else f"; load them into {found.__name__} with the dialect {fits}"
        raise DataError(f"these are weights of {called}, not of {wanted.__name__}{where}")
    if dialect not in dialects:
        raise DataError(f'these are weights of {called}: the dialect that fits is {fits}, not "{dialect}"')


def _check_switches(model: nn.Module, dialect: str) -> None:
    built = _switches(model)
    wanted = DIALECTS[type(model)][dialect]
    wrong = {name: values[0] for name, values in wanted.items() if built.get(name, values[0]) not in values}
    if wrong:
        fix = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UsageError(
            f'this {type(model).__name__} is built for another dialect than "{dialect}": build it with {fix}'
        )


def _switches(model: nn.Module) -> dict[str, str | int | bool]:
    """Read what a model does from its modules; what makes no difference in it is left out."""
    if isinstance(model, Autoformer):
        found = (each.even_lags for each in model.modules() if isinstance(each, AutoCorrelation))
        return {"even_lags": next(found)}
    if not isinstance(model, Informer):
        return {}
    encoding = next(each for each in model.modules() if isinstance(each, EncoderLayer))
    decoding = next(each for each in model.modules() if isinstance(each, DecoderLayer))
    built: dict[str, str | int | bool] = {
        "head_layout": "mix_decoder" if decoding.self_attention.interleave else "ordered",
        "cross_attention": "full" if decoding.apart else "prob",
        "embed_bias": model.enc_embedding.value_embedding.tokenConv.bias is not None,
    }
    if encoding.attention.interleave:
        built["head_layout"] = "scrambled"
    for each in model.modules():
        if isinstance(each, DistilLayer):
            built["distil_padding"] = each.downConv.padding
    return built


def _check_table(key: str, table: Tensor) -> None:
    if table.dim() != 3 or len(table) != 1:
        raise DataError(f"{key} is {list(table.shape)}, not [1, positions, width]")
    if not torch.allclose(table[0].float().cpu(), sinusoid(*table.shape[1:]), rtol=0, atol=1e-4):
        raise DataError(f"{key} is not the usual table of sinusoids")
