"""MossFormer, MossFormer2 and their blocks against tensors recorded from the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from manyheads.core.dispatch import use_backend
from manyheads.speech.models.mossformer import mossformer
from manyheads.speech.models.mossformer2 import MemoryBlock, MossFormer2, mossformer2
from manyheads.speech.models.mossformer_layers import MossFormerBlock

FOLDER = Path(__file__).parents[1] / "golden" / "speech"
MODELS = ["mossformer", "mossformer_long", "mossformer2", "mossformer2_default_inner"]
BLOCKS = ["mossformer_block", "mossformer_block_causal", "mossformer_block_mask", "mossformer2_fsmn_block"]


def build(name: str, config: dict) -> nn.Module:
    if name == "mossformer2_fsmn_block":
        return MemoryBlock(config["dim"], config["inner_channels"])
    if name in BLOCKS:
        sizes = (config["dim"], config["query_key_dim"], config["group_size"], config["dropout"])
        return MossFormerBlock(*sizes, causal=config["causal"])
    keys = ("num_spks", "kernel_size", "query_key_dim", "group_size")
    sizes = {key: config[key] for key in keys} | {"dim": config["in_channels"], "depth": config["num_blocks"]}
    if name.startswith("mossformer2"):
        return mossformer2(**sizes, inner=config["inner_channels"])
    return mossformer(**sizes, causal=config["causal"])


def outputs(name: str, model: nn.Module, x: Tensor, config: dict, mask: Tensor | None) -> dict[str, Tensor]:
    if name == "mossformer2_fsmn_block":
        return {"y": model(x), "fsmn_only": model.gated_fsmn.fsmn(x[..., : config["inner_channels"]])}
    if name in BLOCKS:
        return {"y": model(x, mask=None if mask is None else mask.bool())}
    encoded = (model.enc if isinstance(model, MossFormer2) else model.encoder)(x)
    masks = model.mask_net(encoded)  # [B, S, speakers, N]
    sources = model(x).transpose(1, 2)
    return {"encoder": encoded.transpose(1, 2), "masks": masks.permute(2, 0, 3, 1), "sources": sources}


def check(found: dict[str, Tensor | None], wanted: dict[str, Tensor], relative: float, least: float) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for key, want in wanted.items():
        have = found[key]
        assert have is not None, key
        assert have.shape == want.shape, key
        error = (have.detach() - want).abs().max().item()
        allowed = max(relative * want.abs().max().item(), least)
        assert error <= allowed, f"{key}: off by {error:.1e}, more than {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*MODELS, *BLOCKS])
def test_outputs_and_all_gradients(golden, name, dtype):
    """Recorded in float64, stored as float32. In float32 gradients may be as far off as twice the published
    code's own float32 run, or 1e-5 of the tensor's largest."""
    case = golden("speech", f"{name}_a")
    model = build(name, case.config)
    model.load_state_dict(case.group("param"), strict=True)
    model = model.to(dtype).eval()
    key = "x" if name in BLOCKS else "mixture"
    x = case.tensors[f"input.{key}"].to(dtype).requires_grad_()
    found = outputs(name, model, x, case.config, case.tensors.get("input.mask"))
    sum((found[k] * v.to(dtype)).sum() for k, v in case.group("cotangent").items()).backward()
    official = json.loads((FOLDER / f"{name}_a.json").read_text())["float32_run_max_abs_diff"]["grads"]
    exact = dtype == torch.float64
    check(found, case.group("output"), *((1e-7, 1e-6) if exact else (1e-5, 1e-5)))
    bounds = (1e-7, 1e-6) if exact else (1e-5, 2 * official)
    check({k: p.grad for k, p in model.named_parameters()}, case.group("grad"), *bounds)
    check({key: x.grad}, case.group("grad_input"), *bounds)


@pytest.mark.parametrize("name", ["mossformer", "mossformer2"])
def test_the_slower_backends_agree(golden, name):
    case = golden("speech", f"{name}_a")
    model = build(name, case.config).eval()
    model.load_state_dict(case.group("param"), strict=True)
    for backend in ("reference", "cpu"):
        with use_backend(backend, op="gated_attention_unit"), use_backend(backend, op="depthwise_conv1d"):
            found = outputs(name, model, case.tensors["input.mixture"], case.config, None)
        check(found, case.group("output"), 1e-5, 1e-5)
