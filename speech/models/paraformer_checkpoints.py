"""Published Paraformers, loaded strictly: every key is used, every shape checked, nothing is run from a file.

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

from manyheads.core.errors import DataError
from manyheads.core.weights import misfits
from manyheads.speech.frontend import FrontEnd, read_cmvn
from manyheads.speech.models.paraformer import Paraformer, paraformer
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
_ENCODERS = ("SANMEncoder", "SANMEncoderChunkOpt")
_PREDICTORS = {"CifPredictor": "depthwise", "CifPredictorV2": "full", "CifPredictorV3": "full"}
# What the published configurations say and ours cannot change.
_FIXED: dict[str, dict[str, Any]] = {
    "encoder_conf": {"normalize_before": True, "sanm_shfit": 0, "selfattention_layer_type": "sanm"},
    "decoder_conf": {},
    "predictor_conf": {
        "l_order": 1, "r_order": 1, "threshold": 1.0, "smooth_factor": 1.0, "noise_threshold": 0,
        "smooth_factor2": 0.25, "noise_threshold2": 0.01, "upsample_times": 3, "upsample_type": "cnn_blstm",
        "use_cif1_cnn": False,
    },
    "frontend_conf": {"window": "hamming", "snip_edges": True, "upsacle_samples": True},
    "model_conf": {"share_embedding": False},
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
    config = read_config(folder / "config.yaml")
    tokens = read_tokens(folder)
    front_end = _front_end(config, read_cmvn(folder / "am.mvn"))
    state = read_checkpoint(folder / "model.pt")
    arguments = builder_arguments(config, len(tokens), front_end.size, ctc="ctc.ctc_lo.weight" in state)
    with torch.device("meta"):
        model = paraformer(**arguments)
    check_fit(model, state)
    model.load_state_dict(state, strict=True, assign=True)
    return Published(model.float().eval(), front_end, tokens)


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
    if not path.is_file():
        raise DataError(f"{path} is not there")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} does not hold tensors alone ({why})") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path} is no state dict of tensors")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def check_fit(model: Paraformer, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        DataError: They are another family's, or keys or shapes differ; the first few are named.
    """
    for start, name in _OTHERS:
        if any(key.startswith(start) for key in state):
            raise DataError(f"Paraformer: the weights are those of {name}, which this model is not")
    if faults := misfits(model.state_dict(), state):
        raise DataError(f"Paraformer: the weights do not fit: {faults}")
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise DataError(f"Paraformer: {key} is {tensor.dtype} in the weights")


def read_config(path: Path) -> dict[str, Any]:
    """Read a published `config.yaml`, and refuse what our model cannot be.

    Raises:
        DataError: The file cannot be read, or describes another model.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is not an object")
    known = {
        "model": _MODELS,
        "encoder": _ENCODERS,
        "decoder": ("ParaformerSANMDecoder",),
        "predictor": tuple(_PREDICTORS),
    }
    for key, names in known.items():
        if config.get(key) not in names:
            raise DataError(f"{path}: {key} is {config.get(key)!r}; known are {', '.join(names)}")
    for section, fixed in _FIXED.items():
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
    predictor = _section(config, "predictor_conf")
    for key in ("attention_heads", "linear_units", "kernel_size"):
        if _number(encoder, "encoder_conf", key) != _number(decoder, "decoder_conf", key):
            raise DataError(f"config.yaml: {key} differs between encoder and decoder")
    blocks, attending = (_number(decoder, "decoder_conf", key) for key in ("num_blocks", "att_layer_num"))
    if blocks != attending:
        raise DataError(f"config.yaml: {blocks} decoder layers, of which {attending} attend, are not known")
    width, shift = encoder["kernel_size"], decoder.get("sanm_shfit", 0)
    if shift not in (0, width - 1 - (width - 1) // 2):
        raise DataError(f"config.yaml: decoder_conf.sanm_shfit is {shift!r} with filters of {width}")
    dropout, tail = encoder.get("dropout_rate", 0.1), predictor.get("tail_threshold", 0.0)
    if not isinstance(dropout, float | int) or not isinstance(tail, float | int):
        raise DataError("config.yaml: dropout_rate and tail_threshold must be numbers")
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
