"""depthwise_conv1d against F.conv1d(groups=D) with the transposes that the layout [B, L, D] makes it need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import depthwise_conv1d

# Mamba's convolution, Hydra's, the memories of Paraformer, MossFormer and MossFormer2's FSMN.
WIDTHS = [(4, True, "silu"), (3, True, None), (7, False, "silu"), (11, False, None), (17, False, None)]
WIDTHS += [(31, False, None), (39, False, None)]
PEER = f"torch {torch.__version__}, F.conv1d between two transposes"


def cases(device: str) -> Iterator[Case]:
    """Yield the lines: every width forward, and forward with backward."""
    batch, length, dim = (8, 1024, 256) if device == "cpu" else (16, 4096, 1024)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for width, causal, activation in WIDTHS:
        inputs = [
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((batch, length, dim), (dim, width), (dim,))
        ]
        words = f"{'causal' if causal else 'centred'} {activation or ''}".strip()
        ours, theirs = _ours(causal, activation), _theirs(causal, activation)
        for name, run in (("forward", inference), ("forward+backward", training)):
            steps = run(ours, *inputs), run(theirs, *inputs)
            yield Case(
                name=f"depthwise_conv1d {name}, {words}",
                shape=f"B{batch} L{length} D{dim} W{width}",
                peer=PEER,
                ours=steps[0],
                theirs=steps[1],
                difference=difference(*steps),
                tolerance=1e-4 if dtype == torch.float32 else 2e-2,
            )


def _ours(causal: bool, activation: str | None) -> Callable[..., Tensor]:
    return lambda x, w, b: depthwise_conv1d(x, w, b, causal=causal, activation=activation)


def _theirs(causal: bool, activation: str | None) -> Callable[..., Tensor]:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = weight.shape[1]
        padding = width - 1 if causal else width // 2
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=padding, groups=x.shape[2])
        y = y[..., : x.shape[1]].transpose(1, 2).contiguous()
        return F.silu(y) if activation == "silu" else y

    return convolve
