"""Whole image models against timm's, same weights: Swin-T, MaxViT-T and ViT-S at 224.

Run: python -m benchmarks vision [--device cuda]

A line each against timm's default in torch's own memory format and with channels last: the target holds
against both. On a GPU the peer is timm's model under torch.compile, with larger batches, in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn

from benchmarks.measure import Case, Step, difference, inference
from manyheads.vision.models.core_attention import with_core_attention

SWIN, MAXVIT, VIT = "swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224", "vit_small_patch16_224"
CPU = ((SWIN, 8, 1.2), (SWIN, 1, 1.2), (MAXVIT, 4, 1.15), (MAXVIT, 1, 1.15), (VIT, 8, None), (VIT, 1, None))
CUDA = ((SWIN, 64, 1.3), (MAXVIT, 64, None), (VIT, 64, None))
FORMATS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


def cases(device: str) -> Iterator[Case]:
    """Inference of the three, and a training step of Swin-T."""
    peer = f"timm {timm.__version__}"
    if device == "cuda":
        yield from _compiled(peer)
        return
    for name, batch, target in CPU:
        ours, theirs = pair(name)
        x = torch.randn(batch, 3, 224, 224)
        step = inference(ours.eval(), x)
        for format_name, memory in FORMATS.items():
            model = copy.deepcopy(theirs).eval().to(memory_format=memory)  # type: ignore[call-overload]
            other = inference(model, x.to(memory_format=memory))
            yield Case(
                f"{name} inference", f"B{batch}", peer + format_name, step, other, target,
                difference(step, other),
            )  # fmt: skip
    ours, theirs = pair(SWIN, drop_path_rate=0.0)
    x = torch.randn(4, 3, 224, 224)
    steps = [training_step(model.train(), x) for model in (ours, theirs)]
    yield Case(f"{SWIN} training step", "B4", peer, *steps, 1.0, difference(*steps), 1e-3)


def _compiled(peer: str) -> Iterator[Case]:
    """On a GPU: both under torch.compile, in bfloat16."""
    for name, batch, target in CUDA:
        models = [model.eval().to("cuda", torch.bfloat16) for model in pair(name)]
        x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        steps = [inference(compiled(model), x) for model in models]
        yield Case(
            f"{name} inference", f"B{batch} bfloat16", f"{peer}, compiled", *steps, target,
            difference(*steps), 5e-2,
        )  # fmt: skip


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    """The model under torch.compile."""
    return torch.compile(model)


def pair(name: str, **args: float) -> tuple[nn.Module, nn.Module]:
    """timm's model with our attention, and timm's, with the same weights."""
    theirs = timm.create_model(name, **args)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if p.dim() < 2 or "table" in key:  # biases and tables that do something
                p.add_(0.1 * torch.randn(p.shape))
    return with_core_attention(copy.deepcopy(theirs)), theirs


def training_step(model: nn.Module, x: Tensor) -> Step:
    """Forward and backward; returns the gradients."""
    target = torch.arange(len(x))
    parameters = list(model.parameters())

    def step() -> tuple[Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(model(x), target)
        return torch.autograd.grad(loss, parameters)

    return step
