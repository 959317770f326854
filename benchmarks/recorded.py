"""Families of which no package holds the original: cases recorded from the official code, in tests/golden."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from manyheads.vision.models.cct import cct
from manyheads.vision.models.vim import vim

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "vision"
# Counted on the official code's models, at their own numbers of classes.
COUNTS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "cct_2_3x2_32": 283_723,
    "cct_4_3x2_32": 482_123,
    "cct_6_3x1_32": 3_233_803,
    "cct_7_3x1_32": 3_760_139,
    "cct_7_3x2_32": 3_853_259,
    "cct_14_7x2_224": 22_367_273,
    "cct_14_7x2_384": 22_513_193,
}


def build_vim(c: dict[str, Any]) -> nn.Module:
    """Build a Vim by the official code's options."""
    token = "none" if not c["if_cls_token"] else "double" if c["use_double_cls_token"] else "middle"
    return vim(
        c["embed_dim"], c["depth"], c["d_state"], c["patch_size"], c["stride"], c["num_classes"],
        c["channels"], c["img_size"], token, "v1" if c["if_bimamba"] else c["bimamba_type"],
        c["if_divide_out"], c["init_layer_scale"],
    )  # fmt: skip


def build_cct(c: dict[str, Any]) -> nn.Module:
    """Build a CCT by the official code's options."""
    return cct(
        c["embedding_dim"], c["num_layers"], c["num_heads"], c["mlp_ratio"], c["n_conv_layers"],
        c["kernel_size"], c["stride"], c["padding"], c["num_classes"], c["n_input_channels"], c["img_size"],
        c["positional_embedding"], "seq", c["dropout"], c["attention_dropout"], c["stochastic_depth"],
    )  # fmt: skip


BUILD: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"vim": build_vim, "cct": build_cct}


@cache
def differences(family: str) -> tuple[str, float, float]:
    """Compare all cases of a family: the official code's name, largest differences of outputs and gradients.

    The parameters' names and shapes are the recorded ones, or loading them fails.
    """
    outputs, gradients, origin = [], [], ""
    for file in sorted(GOLDEN.glob(f"{family}_a*.json")):
        case = json.loads(file.read_text())
        origin = f"{case['repo']} {case['commit']}, recorded"
        tensors = load_file(str(file.with_suffix(".safetensors")))
        model = BUILD[family](case["config"]).eval()
        model.load_state_dict(_group(tensors, "param"), strict=True)
        logits = model(tensors["input.images"])
        outputs.append(_error(logits, tensors["output.logits"]))
        found = {"logits": logits}
        if "cotangent.features" in tensors:
            hidden = model.forward_features(tensors["input.images"])  # type: ignore[operator]
            found = {"features": model.forward_head(hidden, pre_logits=True)}  # type: ignore[operator]
            outputs.append(_error(found["features"], tensors["output.features"]))
            found["logits"] = model.forward_head(hidden)  # type: ignore[operator]
        total = sum((value * tensors[f"cotangent.{key}"]).sum() for key, value in found.items())
        total.backward()  # type: ignore[union-attr]
        wanted = _group(tensors, "grad")
        largest = max(want.abs().max() for want in wanted.values())
        for key, want in wanted.items():
            grad = model.get_parameter(key).grad
            assert grad is not None, key
            gradients.append(((grad - want).abs().max() / largest).item())
    return origin, max(outputs), max(gradients)


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _error(found: Tensor, want: Tensor) -> float:
    return ((found - want).abs().max() / want.abs().max()).item()
