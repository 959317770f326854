"""Integrate-and-fire against the published loop over frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import continuous_integrate_and_fire


def peer(hidden: Tensor, alpha: Tensor) -> Tensor:
    """One step a frame: add, fire where the threshold is reached, keep the rest; then collect the fires."""
    batch, frames, dim = hidden.shape
    integrate, token = hidden.new_zeros(batch), hidden.new_zeros(batch, dim)
    tokens, fires = [], []
    for t in range(frames):
        weight = alpha[:, t]
        left = torch.ones(batch, device=hidden.device) - integrate
        integrate = integrate + weight
        fires.append(integrate)
        fired = integrate >= 1.0
        integrate = torch.where(fired, integrate - torch.ones(batch, device=hidden.device), integrate)
        used = torch.where(fired, left, weight)
        rest = weight - used
        token = token + used[:, None] * hidden[:, t]
        tokens.append(token)
        token = torch.where(fired[:, None].repeat(1, dim), rest[:, None] * hidden[:, t], token)
    every, fire = torch.stack(tokens, 1), torch.stack(fires, 1) >= 1.0
    rows = [every[b].index_select(0, fire[b].nonzero()[:, 0]) for b in range(batch)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def ours(hidden: Tensor, alpha: Tensor) -> Tensor:
    """The op's tokens."""
    return continuous_integrate_and_fire(hidden, alpha).tokens


def cases(device: str) -> Iterator[Case]:
    """Yield the issue's line, and the pass with gradients of fewer frames: the loop's time grows with T^2."""
    for name, make, frames in (("forward", inference, 1000), ("forward+backward", training, 250)):
        hidden = torch.randn(8, frames, 512, device=device)
        # Multiples of 1/64: both sums are exact, and no token hangs on the rounding of one.
        alpha = torch.randint(1, 26, (8, frames), device=device) / 64
        a, b = make(ours, hidden, alpha), make(peer, hidden, alpha)
        yield Case(
            name=f"continuous_integrate_and_fire {name}",
            shape=f"B8 T{frames} D512",
            peer=f"loop over frames, torch {torch.__version__}",
            ours=a,
            theirs=b,
            target=20.0,
            difference=difference(a, b),
        )
