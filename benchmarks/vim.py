"""Vim-tiny whole: against itself with the step-by-step scan, against ViT-tiny, and on a GPU at 1248 x 1248.

Run: python -m benchmarks vision --only vim. The plain peer has the same weights and is what the official code
computes, in torch alone: flips, convolution, and a loop over the tokens. ViT's line asks for at most five
times its time (a ratio of 0.2). On a GPU the paper's comparison: features of a batch at 1248 x 1248.
"""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

from benchmarks.mamba import peer as plain_mixer
from benchmarks.measure import Case, difference, inference
from manyheads.vision.models.vim import VisionMamba, vim_tiny_patch16_224

PLAIN = f"Vim-tiny, two flipped scans step by step, torch {torch.__version__}"
LARGE = 1248


def plain(model: VisionMamba, x: Tensor) -> Tensor:
    """The whole model by the literal formulas; same weights."""
    tokens = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    middle = tokens.shape[1] // 2
    token = model.cls_token.expand(len(x), -1, -1)
    hidden = torch.cat([tokens[:, :middle], token, tokens[:, middle:]], 1) + model.pos_embed
    stream = torch.zeros_like(hidden)
    for block in model.layers:
        stream = stream + hidden
        hidden = plain_mixer(block.mixer, _rms(stream, block.norm.weight))
    return model.head(_rms(stream + hidden, model.norm_f.weight)[:, middle])


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def cases(device: str) -> Iterator[Case]:
    model = vim_tiny_patch16_224().eval().to(device)
    vit = timm.create_model("vit_tiny_patch16_224").eval().to(device)
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224, device=device)
        ours = inference(model, x)
        theirs = inference(lambda x: plain(model, x), x)
        shape = f"B{batch} 224x224"
        yield Case("Vim-tiny forward", shape, PLAIN, ours, theirs, 5.0, difference(ours, theirs))
        yield Case(
            "Vim-tiny forward, at most 5x ViT-tiny", shape, f"vit_tiny_patch16_224, timm {timm.__version__}",
            ours, inference(vit, x), 0.2,
        )  # fmt: skip
    if device == "cuda":
        yield large(device)


def large(device: str) -> Case:
    """Features of a batch in half precision against DeiT-tiny's: 2.8 times as fast, 13.2 % of its memory."""
    model = vim_tiny_patch16_224(num_classes=0, img_size=LARGE).eval().to(device)
    deit = timm.create_model("deit_tiny_patch16_224", num_classes=0, img_size=LARGE).eval().to(device)
    x = torch.randn(64, 3, LARGE, LARGE, device=device)

    def half(module: nn.Module) -> object:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return module(x)

        return inference(run, x)

    return Case(
        "Vim-tiny features", f"B64 {LARGE}x{LARGE} bfloat16",
        f"deit_tiny_patch16_224, timm {timm.__version__}",
        half(model), half(deit), 2.8, memory=1 - 0.868,  # type: ignore[arg-type]
    )  # fmt: skip
