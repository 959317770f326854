"""The bidirectional Mamba mixer at Vim-tiny's sizes against two scans with flips, step by step in torch.

Run: python -m benchmarks core --only mamba. Both use the same weights; the peer flips the projected input and
the second scan's output, as the official code does, and convolves with torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Step, difference
from benchmarks.selective_scan import steps
from manyheads.core.layers import BidirectionalMamba

PEER = f"two flipped scans, step formula, torch {torch.__version__}"
BATCH, LENGTH, DIM = 8, 197, 192


def peer(block: BidirectionalMamba, x: Tensor) -> Tensor:
    xz = block.in_proj(x).transpose(1, 2)  # [B, 2E, L]
    y = direction(block, xz, "", block.A_log) + direction(block, xz.flip(2), "_b", block.A_b_log).flip(2)
    return F.linear(y.transpose(1, 2) / 2, block.out_proj.weight)


def direction(block: BidirectionalMamba, xz: Tensor, suffix: str, A_log: Tensor) -> Tensor:
    conv, x_proj, dt_proj, D = (
        getattr(block, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")
    )
    u, z = xz.chunk(2, 1)
    u = F.silu(F.conv1d(u, conv.weight, conv.bias, padding=3, groups=u.shape[1])[..., : u.shape[2]])
    n = A_log.shape[1]
    dt, B, C = x_proj(u.transpose(1, 2)).transpose(1, 2).split([dt_proj.in_features, n, n], 1)
    return steps(u, dt_proj.weight @ dt, -torch.exp(A_log), B, C, D, z, dt_proj.bias)


def cases(device: str) -> Iterator[Case]:
    block = BidirectionalMamba(DIM).to(device)
    x = torch.randn(BATCH, LENGTH, DIM, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    wanted = [x, *block.parameters()]
    shape = f"B{BATCH} L{LENGTH} dim{DIM} N16"

    def step(function: type | object, backward: bool) -> Step:
        def run() -> object:
            with torch.set_grad_enabled(backward):
                y = function(x)  # type: ignore[operator]
            return torch.autograd.grad(y, wanted, cotangent) if backward else y

        return run

    for backward, name in ((False, "forward"), (True, "forward+backward")):
        mine, theirs = step(block, backward), step(lambda x: peer(block, x), backward)
        yield Case(
            f"bidirectional Mamba mixer {name}", shape, PEER, mine, theirs, 4.0, difference(mine, theirs)
        )
