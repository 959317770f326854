"""The attention that a selective scan hides: how much of each token's input is in each token's output.

    y_t = sum over s <= t of  [ sum over n of C_t[n] exp(A[n] (S_t - S_s)) B_s[n] ] delta_s u_s

with S the running sum of delta, for each channel: a lower triangular matrix, upper for the reverse scan. Rows
go in blocks. Before a block, the exponent is cut in two at the block's first row, both parts below zero, so
that a block is a product of two matrices and nothing overflows; inside it, the exponents are written out.

Source: Ali et al. 2024 (arXiv 2403.01590), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.layers.mamba import BidirectionalMamba, Mamba
from manyheads.core.ops.depthwise_conv1d import depthwise_conv1d

ROWS = 16
HELD = 1 << 22  # weights that are held at a time, but at least those of one channel


class Scan(NamedTuple):
    """The inputs of one direction's scan of one sequence, in the scan's own order.

    Shape:
        u, delta `[L, E]` (delta with bias and softplus), A `[E, N]`, B, C `[L, N]`, D `[E]`; z `[L, E]`.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    reverse: bool


def scans(mixer: BidirectionalMamba | Mamba, x: Tensor) -> list[Scan]:
    """Return the scans that a mixer runs on a sequence, forward and, where it has one, backward.

    Shape:
        x `[1, L, dim]`.
    """
    both = isinstance(mixer, BidirectionalMamba)
    own = both and mixer.kind == "v2"  # else the decays alone are the backward direction's own
    u, z = mixer.in_proj(x).chunk(2, -1)
    found = []
    for reverse in (False, True) if both else (False,):
        tail = "_b" if reverse and own else ""
        conv, x_proj, dt_proj, D = (
            getattr(mixer, name + tail) for name in ("conv1d", "x_proj", "dt_proj", "D")
        )
        A_log = cast(Tensor, mixer.A_b_log if reverse else mixer.A_log)
        v = depthwise_conv1d(u, conv.weight[:, 0], conv.bias, activation="silu", reverse=reverse and own)
        dt, B, C = x_proj(v).split([dt_proj.in_features, A_log.shape[1], A_log.shape[1]], -1)
        delta = F.softplus(F.linear(dt, dt_proj.weight).float() + dt_proj.bias.float())
        v, delta, B, C, gate = (part[0].float() for part in (v, delta, B, C, z))
        found.append(Scan(v, delta, -torch.exp(A_log.float()), B, C, D.float(), gate, reverse))
    return found


def matrices(scan: Scan) -> Iterator[tuple[slice, Tensor]]:
    """Yield the matrices of the channels, some channels at a time.

    Yields:
        Which channels, and their matrices `[E', L, L]`: `y[:, c] = matrix[c] @ u[:, c]`, without the skip by
        D and the gate by z.
    """
    order = (lambda t: t.flip(0)) if scan.reverse else (lambda t: t)
    delta, B, C = order(scan.delta), order(scan.B), order(scan.C)
    channels = max(1, HELD // len(delta) ** 2)
    for start in range(0, delta.shape[1], channels):
        part = slice(start, start + channels)
        found = _lower(delta[:, part].T, scan.A[part], B, C)
        yield part, found.flip(1, 2) if scan.reverse else found


def _lower(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The matrices of a scan that runs forward.

    Shape:
        delta `[E, L]`, A `[E, N]`, B, C `[L, N]`; the result `[E, L, L]`.
    """
    length = delta.shape[1]
    total = delta.double().cumsum(1)  # its differences are taken, of far larger sums
    found = delta.new_zeros(len(delta), length, length)
    for first in range(0, length, ROWS):
        rows = slice(first, min(first + ROWS, length))
        passed = total[:, rows, None] - total[:, None, rows]  # [E, R, R]
        inside = torch.tril(passed).float()[..., None] * A[:, None, None]  # [E, R, R, N]
        pairs = C[rows][:, None] * B[rows]  # [R, R, N]
        found[:, rows, rows] = torch.tril((torch.exp(inside) * pairs).sum(-1))
        if first:
            edge = total[:, first - 1 : first]
            after = torch.exp((total[:, rows] - edge).float()[..., None] * A[:, None]) * C[rows]  # [E, R, N]
            before = torch.exp((edge - total[:, :first]).float()[..., None] * A[:, None]) * B[:first]
            found[:, rows, :first] = after @ before.mT
    return found.mul_(delta[:, None])


def weights(mixer: BidirectionalMamba | Mamba, x: Tensor) -> Tensor:
    """Return how much each token takes of each: absolute weights, the mean over channels and directions.

    Shape:
        x `[1, L, dim]`; the result `[L, L]`, rows that sum to 1.
    """
    length = x.shape[1]
    total = torch.zeros(length, length, device=x.device)
    for scan in scans(mixer, x):
        for _, part in matrices(scan):
            total += part.abs_().sum(0)
    return total / total.sum(1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
