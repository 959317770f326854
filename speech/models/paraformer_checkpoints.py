"""Published Paraformers, loaded strictly, made model folders: every key used, nothing run from a file.

A published folder holds `model.pt` (a state dict), `config.yaml` (sizes), `am.mvn` (the front end's mean and
variance), `tokens.json` or `tokens.txt`, and `seg_dict` for English. The published weights are not under the
code's licence: they come under the FunASR Model Open Source License, which asks for attribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.core import hub
from manyheads.core.errors import DataError
from manyheads.core.weights import misfits, read_tensors
from manyheads.speech.frontend import FrontEnd, read_cmvn
from manyheads.speech.models.paraformer import Paraformer, paraformer, paraformer_conformer
from manyheads.speech.recognition.preprocessing import Features, Preprocessing
from manyheads.speech.tokens import Tokens, read_tokens

# Keys that only another family has, by how they begin, and how it is called in a message.
_OTHERS = (
    ("bias_encoder.", "a contextual Paraformer, with hotwords"),
    ("bias_embed.", "a contextual Paraformer, with hotwords"),
    ("seaco_decoder.", "a SeACo-Paraformer, with hotwords"),
    ("decoder.bias_decoder.", "a contextual Paraformer, with hotwords"),
    ("encoder.embed.", "a Paraformer with a convolutional input layer (the AISHELL recipe's Conformer)"),
    ("encoder.encoders.0.conv_module.", "a Paraformer with a Conformer encoder"),
    ("decoder.decoders2.", "a Paraformer whose decoder has layers without attention"),
    ("decoder.decoders.0.self_attn.linear_q.", "a Paraformer with a Transformer decoder"),
    ("joint_network.", "a transducer"),
)
_MODELS = ("Paraformer", "BiCifParaformer", "ParaformerStreaming")
_ENCODERS = ("SANMEncoder", "SANMEncoderChunkOpt", "ConformerEncoder")
_CONFORMER = "ConformerEncoder"
MOST = 1 << 20  # letters of a config; with aliases a few of them unfold to a terabyte
LICENCE = "FunASR Model Open Source License (attribution)"  # of the published weights
_PREDICTORS = {"CifPredictor": "depthwise", "CifPredictorV2": "full", "CifPredictorV3": "full"}
# What the published configurations say and ours cannot change.
_FIXED: dict[str, dict[str, Any]] = {
    "encoder_conf": {"normalize_before": True},
    "decoder_conf": {"normalize_before": True, "concat_after": False},
    "predictor_conf": {
        "l_order": 1, "r_order": 1, "threshold": 1.0, "smooth_factor": 1.0, "noise_threshold": 0,
        "smooth_factor2": 0.25, "noise_threshold2": 0.01, "upsample_times": 3, "upsample_type": "cnn_blstm",
        "use_cif1_cnn": False,
    },
    "frontend_conf": {"window": "hamming", "snip_edges": True, "upsacle_samples": True},
    "model_conf": {"share_embedding": False},
}  # fmt: skip
_FIXED_ENCODERS: dict[str, dict[str, Any]] = {
    "SANM": {"sanm_shfit": 0, "selfattention_layer_type": "sanm"},
    "Conformer": {
        "input_layer": "conv2d", "pos_enc_layer_type": "rel_pos", "selfattention_layer_type": "rel_selfattn",
        "positionwise_layer_type": "linear", "activation_type": "swish", "macaron_style": True,
        "use_cnn_module": True, "concat_after": False, "attention_dropout_rate": 0.0, "zero_triu": False,
    },
}  # fmt: skip


class Published(NamedTuple):
    """A published folder's contents, ready to recognise."""

    model: Paraformer
    front_end: FrontEnd
    tokens: Tokens


def load_published(folder: Path) -> Published:
    """Read a published folder.

    Args:
        folder: With `model.pt`, `config.yaml`, `am.mvn`, the tokens, and `seg_dict` where there is one.

    Returns:
        The model in evaluation mode, on the CPU; the front end, without dither; the tokens.

    Raises:
        DataError: A file is missing or broken, the model is of another family, or files do not fit together.

    Example:
        >>> model, front_end, tokens = load_published(Path("speech_paraformer-large_asr_nat-zh-cn"))
        >>> found = model(front_end(samples)[None])
        >>> tokens.text(greedy(found.logits, found.counts)[0])
    """
    return _read(folder)[0]


def convert(published: str | Path, folder: str | Path) -> hub.ModelConfig:
    """Write a model folder from a published one.

    Args:
        published: As `load_published` takes it.
        folder: The model folder to write.

    Raises:
        DataError: As `load_published`.

    Example:
        >>> convert("speech_paraformer-large_asr_nat-zh-cn", "paraformer_zh")  # doctest: +SKIP
    """
    (model, front_end, tokens), config, arguments = _read(Path(published))
    features = Features(
        front_end.mels, front_end.frame_ms, front_end.hop_ms, front_end.stack, front_end.stride
    )
    preprocessing = Preprocessing.of(front_end.sample_rate, features, front_end.cmvn, tokens)
    return hub.save(
        folder,
        model,
        domain="speech",
        name="paraformer_conformer" if config["encoder"] == _CONFORMER else "paraformer",
        arguments=arguments,
        preprocessing=preprocessing.to_json(),
        training={"converted_from": Path(published).name, "licence": LICENCE},
    )


def _read(folder: Path) -> tuple[Published, dict[str, Any], dict[str, Any]]:
    """Read a published folder: what it holds, its configuration, and the builder's arguments."""
    config = read_config(folder / "config.yaml")
    tokens = read_tokens(folder)
    front_end = _front_end(config, read_cmvn(folder / "am.mvn"))
    state = read_checkpoint(folder / "model.pt")
    find = _conformer_arguments if config["encoder"] == _CONFORMER else builder_arguments
    arguments = find(config, len(tokens), front_end.size, "ctc.ctc_lo.weight" in state)
    with torch.device("meta"):
        model = (paraformer_conformer if config["encoder"] == _CONFORMER else paraformer)(**arguments)
    check_fit(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    return Published(model.float().eval(), front_end, tokens), config, arguments


def load_weights(model: Paraformer, state: Mapping[str, Tensor]) -> None:
    """Load a published state dict; every key is used and every shape checked before any is copied.

    Raises:
        DataError: The weights are another family's, or keys or shapes are not the model's.
    """
    check_fit(model, state)
    model.load_state_dict(state, strict=True)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `model.pt`; what wraps them in training (`state_dict`, `module.`) is taken off.

    Raises:
        DataError: The file cannot be read, or holds something else than tensors by name.
    """
    state = read_tensors(path, ("state_dict", "model_state_dict", "model"))
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def check_fit(model: Paraformer, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        DataError: They are another family's, or keys or shapes differ; the first few are named.
    """
    wanted = model.state_dict()
    for start, name in _OTHERS:
        if any(key.startswith(start) for key in state) and not any(key.startswith(start) for key in wanted):
            raise DataError(f"Paraformer: the weights are those of {name}, which this model is not")
    if faults := misfits(wanted, state):
        raise DataError(f"Paraformer: the weights do not fit: {faults}")
    for key, tensor in state.items():
        if tensor.is_floating_point() != wanted[key].is_floating_point():
            raise DataError(f"Paraformer: {key} is {tensor.dtype} in the weights")


def read_config(path: Path) -> dict[str, Any]:
    """Read a published `config.yaml`, and refuse what our model cannot be.

    Raises:
        DataError: The file cannot be read, or describes another model.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MOST or any(isinstance(each, yaml.AliasToken) for each in yaml.scan(text)):
            raise DataError(f"{path} is too long, or repeats parts of itself by aliases: refused")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not an object")
    conformer = config.get("encoder") == _CONFORMER
    known = {
        "model": ("Paraformer",) if conformer else _MODELS,
        "encoder": _ENCODERS,
        "decoder": ("ParaformerSANDecoder",) if conformer else ("ParaformerSANMDecoder",),
        "predictor": ("CifPredictor",) if conformer else tuple(_PREDICTORS),
    }
    for key, names in known.items():
        if config.get(key) not in names:
            raise DataError(f"{path}: {key} is {config.get(key)!r}; known are {', '.join(names)}")
    encoders = _FIXED_ENCODERS["Conformer" if conformer else "SANM"]
    for section, fixed in (*_FIXED.items(), ("encoder_conf", encoders)):
        given = config.get(section) or {}
        if not isinstance(given, dict):
            raise DataError(f"{path}: {section} is not an object")
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise DataError(f"{path}: {section}.{key} is {given[key]!r}; only {value!r} is known")
    return config


def builder_arguments(config: Mapping[str, Any], words: int, features: int, ctc: bool) -> dict[str, Any]:
    """A published configuration as the arguments of `paraformer`.

    Args:
        config: As `read_config` gives it.
        words, features: Of the token list; of the front end's rows.
        ctc: Whether the weights have a CTC head.

    Raises:
        DataError: A number is missing or is none, or encoder and decoder differ where ours cannot.
    """
    encoder, decoder = _section(config, "encoder_conf"), _section(config, "decoder_conf")
    for key in ("attention_heads", "linear_units", "kernel_size"):
        if _number(encoder, "encoder_conf", key) != _number(decoder, "decoder_conf", key):
            raise DataError(f"config.yaml: {key} differs between encoder and decoder")
    blocks, attending = (_number(decoder, "decoder_conf", key) for key in ("num_blocks", "att_layer_num"))
    if blocks != attending:
        raise DataError(f"config.yaml: {blocks} decoder layers, of which {attending} attend, are not known")
    width, shift = encoder["kernel_size"], decoder.get("sanm_shfit", 0)
    if shift not in (0, width - 1 - (width - 1) // 2):
        raise DataError(f"config.yaml: decoder_conf.sanm_shfit is {shift!r} with filters of {width}")
    dropout, tail = _rates(config)
    return {
        "vocab_size": words,
        "input_size": features,
        "dim": _number(encoder, "encoder_conf", "output_size"),
        "heads": encoder["attention_heads"],
        "units": encoder["linear_units"],
        "encoder_blocks": _number(encoder, "encoder_conf", "num_blocks"),
        "decoder_blocks": blocks,
        "width": width,
        "dropout": dropout,
        "predictor": _PREDICTORS[config["predictor"]],
        "timestamps": config["predictor"] == "CifPredictorV3",
        "streaming": shift > 0,
        "ctc": ctc,
        "tail": tail,
    }


def _conformer_arguments(config: Mapping[str, Any], words: int, features: int, ctc: bool) -> dict[str, Any]:
    """A published configuration as the arguments of `paraformer_conformer`; errors as `builder_arguments`."""
    encoder, decoder = _section(config, "encoder_conf"), _section(config, "decoder_conf")
    for key in ("attention_heads", "linear_units"):
        if _number(encoder, "encoder_conf", key) != _number(decoder, "decoder_conf", key):
            raise DataError(f"config.yaml: {key} differs between encoder and decoder")
    kind = encoder.get("rel_pos_type", "legacy")
    if kind not in ("legacy", "latest"):
        raise DataError(f"config.yaml: encoder_conf.rel_pos_type is {kind!r}; known are legacy, latest")
    dropout, tail = _rates(config)
    return {
        "vocab_size": words,
        "input_size": features,
        "dim": _number(encoder, "encoder_conf", "output_size"),
        "heads": encoder["attention_heads"],
        "units": encoder["linear_units"],
        "encoder_blocks": _number(encoder, "encoder_conf", "num_blocks"),
        "decoder_blocks": _number(decoder, "decoder_conf", "num_blocks"),
        "width": _number(encoder, "encoder_conf", "cnn_module_kernel"),
        "dropout": dropout,
        "positions": "legacy" if kind == "legacy" else "relative",
        "ctc": ctc,
        "tail": tail,
    }


def _rates(config: Mapping[str, Any]) -> tuple[float, float]:
    """The dropout, and the weight of the tail; the published classes' defaults where they are not said."""
    default = 0.45 if config["predictor"] == "CifPredictor" else 0.0
    dropout = _section(config, "encoder_conf").get("dropout_rate", 0.1)
    tail = _section(config, "predictor_conf").get("tail_threshold", default)
    if not isinstance(dropout, float | int) or not isinstance(tail, float | int):
        raise DataError("config.yaml: dropout_rate and tail_threshold must be numbers")
    return dropout, tail


def _front_end(config: Mapping[str, Any], cmvn: Tensor) -> FrontEnd:
    given = _section(config, "frontend_conf")
    names = {"fs": "sample_rate", "n_mels": "mels", "frame_length": "frame_ms", "frame_shift": "hop_ms"}
    names |= {"lfr_m": "stack", "lfr_n": "stride"}
    arguments = {ours: _number(given, "frontend_conf", key) for key, ours in names.items()}
    return FrontEnd(cmvn, **arguments)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise DataError(f"config.yaml: {name} is missing")
    return section


def _number(section: Mapping[str, Any], name: str, key: str) -> int:
    number = section.get(key)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise DataError(f"config.yaml: {name}.{key} must be a positive whole number, not {number!r}")
    return number
