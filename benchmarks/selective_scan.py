"""The selective scan against the step-by-step formula of the original reference, in torch.

Run: python -m benchmarks core --only selective_scan. The peer has its own layout, channels before time, and
makes the decays and inputs of all steps at once; softplus, D and the gate are part of both. The original
takes step t by an index, whose gradient is as large as all steps together, so that its backward takes L times
as long; the peer here unbinds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Step, difference, inference, training
from manyheads.core.dispatch import use_backend
from manyheads.core.ops import selective_scan

PEER = f"the original's step formula, torch {torch.__version__}"


def steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """u, delta, z `[B, D, L]`, B and C `[B, N, L]`; also the peer of benchmarks/mamba.py."""
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = decay.new_zeros(decay.shape[0], *A.shape)
    ys = []
    for kept, new, read in zip(decay.unbind(2), added.unbind(2), C.unbind(2), strict=True):
        h = kept * h + new
        ys.append(torch.einsum("bdn,bn->bd", h, read))
    return (torch.stack(ys, 2) + u * D[:, None]) * F.silu(z)


def ours(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    return selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)


def draw(device: str, batch: int, length: int, d: int, n: int) -> list[Tensor]:
    """Inputs in our layout; decays as a trained model's, near -1 ... -N."""
    u, delta, z = (torch.randn(batch, length, d) for _ in range(3))
    B, C = (torch.randn(batch, length, n) for _ in range(2))
    A = -torch.arange(1.0, n + 1) * torch.empty(d, n).uniform_(0.5, 1.5)
    return [x.to(device) for x in (u, delta - 3, A, B, C, torch.ones(d), z, torch.randn(d))]


def cases(device: str) -> Iterator[Case]:
    for batch, length, first in ((1, 1024, True), (8, 197, False)):
        inputs = draw(device, batch, length, 384, 16)
        turned = [turn(x) for x in inputs]
        cotangent = torch.randn(batch, length, 384, device=device)
        shape = f"B{batch} L{length} D384 N16"
        mine, theirs = inference(ours, *inputs), inference(steps, *turned)
        yield compare("forward", shape, mine, theirs, 8.0 if first else None)
        if first and device == "cpu":
            yield compare("forward, without numba", shape, plain(mine), theirs)
        mine = training(ours, *inputs, cotangent=cotangent)
        theirs = training(steps, *turned, cotangent=turn(cotangent))
        yield compare(
            "forward+backward", shape, mine, theirs, 6.0 if first else None, 0.125 if first else None
        )
        if first and device == "cpu":
            yield compare("forward+backward, without numba", shape, plain(mine), theirs)


def compare(
    name: str, shape: str, mine: Step, theirs: Step, target: float | None = None, memory: float | None = None
) -> Case:
    def same() -> object:
        found = theirs()
        return turn(found) if isinstance(found, Tensor) else [turn(x) for x in found]  # type: ignore[attr-defined]

    differ = difference(mine, same)
    return Case(f"selective_scan {name}", shape, PEER, mine, theirs, target, differ, memory=memory)


def plain(step: Step) -> Step:
    """The same by torch alone, as where numba is missing."""

    def run() -> object:
        with use_backend("cpu"):
            return step()

    return run


def turn(x: Tensor) -> Tensor:
    """Between `[B, L, D]` and `[B, D, L]`."""
    return x.transpose(1, 2).contiguous() if x.ndim == 3 else x
