"""What a training from nothing may begin with, so that a short one gets somewhere.

As published, encoder and decoder are noise to each other: the first steps go into filters that give a
waveform back. And queries and keys begin so small (deviation 0.02) that their products squared are nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.speech.models.mossformer import MossFormer
from manyheads.speech.models.mossformer2 import MossFormer2
from manyheads.speech.models.mossformer_layers import OffsetScale

ATTENTION = 1.0  # what queries and keys are scaled by, on average


def cosine_filters(kernel_size: int) -> Tensor:
    """Return windowed cosines, and the same negated: a mixture's non-negative features give it back exactly.

    Shape:
        `[kernel_size, kernel_size]`: filters, samples.

    Source:
        The modified discrete cosine transform, Princen and Bradley 1986.
    """
    half = kernel_size // 2
    n = torch.arange(kernel_size, dtype=torch.float64) + 0.5
    frequencies = torch.arange(half, dtype=torch.float64)[:, None] + 0.5
    window = torch.sin(math.pi * n / kernel_size)
    filters = math.sqrt(2 / half) * torch.cos(math.pi / half * (n + half / 2) * frequencies) * window
    return torch.cat((filters, -filters)).float()


@torch.no_grad()
def cosine(model: nn.Module) -> None:
    """Give a fresh model filters that go together, and attention that sees.

    Raises:
        UsageError: The model has fewer features than a frame has samples, or none of these parts.
    """
    if isinstance(model, MossFormer):
        encoder, decoder = model.encoder.conv1d.weight, model.decoder.weight  # [dim, 1, K]
    elif isinstance(model, MossFormer2):
        encoder, decoder = model.enc.conv1d.weight, model.dec.weight
    else:
        raise UsageError("fresh: cosine goes with MossFormer and MossFormer2")
    dim, _, kernel = encoder.shape
    if dim < kernel:
        raise UsageError(f"fresh: cosine needs as many features as a frame has samples: {kernel}, not {dim}")
    filters = cosine_filters(kernel)
    encoder[:kernel, 0] = decoder[:kernel, 0] = filters
    decoder[kernel:] *= 0.1
    for layer in model.modules():
        if isinstance(layer, OffsetScale):
            nn.init.normal_(layer.gamma, ATTENTION, 0.2)
