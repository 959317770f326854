"""The published speech code, where it is installed: peers of the speech table, no dependency of ours.

In an environment of their own, beside the same torch and torchaudio:

    pip install funasr einops rotary-embedding-torch torchinfo yamlargparse
    pip install --no-deps clearvoice

clearvoice pins old versions, hence `--no-deps`. Its `__init__` loads what it needs for files, and is not run.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any, Literal

from torch import nn

FUNASR = (
    "bicif_paraformer.cif_predictor", "bicif_paraformer.model", "conformer.encoder",
    "paraformer.cif_predictor", "paraformer.decoder", "paraformer.model", "sanm.encoder",
)  # fmt: skip
Kind = Literal["plain", "timestamps", "conformer"]
PREDICTOR: dict[str, Any] = {"threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45}
LAYERS: dict[str, Any] = {"attention_heads": 4, "linear_units": 2048, "kernel_size": 11, "sanm_shfit": 0}


def is_installed(package: str) -> bool:
    """Tell whether a peer is there, without importing it."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def label(package: str) -> str:
    """A peer with its version."""
    return f"{package} {version(package)}"


def clearvoice() -> Any:
    """ClearerVoice's module of MossFormer2 for separation."""
    for name in ("clearvoice", "clearvoice.models"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(distribution("clearvoice").locate_file(name.replace(".", "/")))]
            sys.modules[name] = package
    return importlib.import_module("clearvoice.models.mossformer2_ss.mossformer2")


def clearvoice_blocks(dim: int, depth: int, group: int) -> nn.Module:
    """ClearerVoice's stack of MossFormer2's blocks."""
    clearvoice()
    blocks = importlib.import_module("clearvoice.models.mossformer2_ss.mossformer2_block")
    found: nn.Module = blocks.MossformerBlock_GFSMN(dim=dim, depth=depth, group_size=group)
    return found.eval()


def funasr_paraformer(kind: Kind = "plain") -> Any:
    """funasr's Paraformer-large, the same with timestamps, or the AISHELL recipe's; with random weights."""
    logging.getLogger().setLevel(logging.ERROR)
    for name in FUNASR:
        importlib.import_module(f"funasr.models.{name}")
    options = _conformer() if kind == "conformer" else _large(kind == "timestamps")
    name = "BiCifParaformer" if kind == "timestamps" else "Paraformer"
    return importlib.import_module("funasr.register").tables.model_classes[name](**options).eval()


def _large(timestamps: bool) -> dict[str, Any]:
    predictor: dict[str, Any] = PREDICTOR | {"idim": 512}
    if timestamps:
        predictor |= {"smooth_factor2": 0.25, "noise_threshold2": 0.01, "upsample_times": 3}
        predictor |= {"use_cif1_cnn": False, "upsample_type": "cnn_blstm"}
    return {
        "encoder": "SANMEncoder",
        "encoder_conf": LAYERS | {"output_size": 512, "num_blocks": 50, "input_layer": "pe"},
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": LAYERS | {"num_blocks": 16, "att_layer_num": 16},
        "predictor": "CifPredictorV3" if timestamps else "CifPredictorV2",
        "predictor_conf": predictor,
        "ctc_weight": 0.0,
        "input_size": 560,
        "vocab_size": 8404,
    }


def _conformer() -> dict[str, Any]:
    sizes = {"attention_heads": 4, "linear_units": 2048}
    return {
        "encoder": "ConformerEncoder",
        "encoder_conf": sizes | {"output_size": 256, "num_blocks": 12, "input_layer": "conv2d",
                                 "macaron_style": True, "cnn_module_kernel": 15},
        "decoder": "ParaformerSANDecoder",
        "decoder_conf": sizes | {"num_blocks": 6},
        "predictor": "CifPredictor",
        "predictor_conf": PREDICTOR | {"idim": 256},
        "ctc_weight": 0.3,
        "input_size": 80,
        "vocab_size": 4233,
    }  # fmt: skip


def funasr_front_end() -> Any:
    """funasr's front end without noise and normalisation: samples, lengths to rows, lengths."""
    module = importlib.import_module("funasr.frontends.wav_frontend")
    return module.WavFrontend(fs=16000, lfr_m=7, lfr_n=6, dither=0.0)
