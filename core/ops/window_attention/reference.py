"""Window attention step by step: roll, partition, attend, put back, roll back; in any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.core.ops.window_attention.geometry import Geometry, Pair, Partition, geometry


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Pair,
    *,
    shift: Pair = 0,
    partition: Partition = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend inside windows with every step in memory; arguments as the public function's."""
    where = geometry(q.shape[1], q.shape[2], window, shift, partition)
    qw, kw, vw = (split(x, where) for x in (q, k, v))  # [B, windows, n, heads, D]
    scores = torch.einsum("bwihd,bwjhd->bwhij", qw, kw) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if where.shifted:
        sides = regions(where).to(q.device)[None, :, :, None, None]
        region = split(sides, where)[0, :, :, 0, 0]  # [windows, n]
        scores = scores.masked_fill((region[:, :, None] != region[:, None, :])[:, None], -math.inf)
    weights = _softmax(scores).to(v.dtype)
    return join(torch.einsum("bwhij,bwjhd->bwihd", weights, vw), where)


def split(x: Tensor, where: Geometry) -> Tensor:
    """Cut images `[B, H, W, heads, D]` into windows `[B, windows, n, heads, D]`."""
    rows, columns = where.height // where.window_h, where.width // where.window_w
    x = torch.roll(x, (-where.shift_h, -where.shift_w), (1, 2)) if where.shifted else x
    if where.grid:
        x = x.unflatten(1, (where.window_h, rows)).unflatten(3, (where.window_w, columns))
        x = x.permute(0, 2, 4, 1, 3, 5, 6)
    else:
        x = x.unflatten(1, (rows, where.window_h)).unflatten(3, (columns, where.window_w))
        x = x.permute(0, 1, 3, 2, 4, 5, 6)
    return x.flatten(3, 4).flatten(1, 2)


def join(x: Tensor, where: Geometry) -> Tensor:
    """Put windows `[B, windows, n, heads, D]` back into images `[B, H, W, heads, D]`."""
    rows, columns = where.height // where.window_h, where.width // where.window_w
    x = x.unflatten(1, (rows, columns)).unflatten(3, (where.window_h, where.window_w))
    x = x.permute(0, 3, 1, 4, 2, 5, 6) if where.grid else x.permute(0, 1, 3, 2, 4, 5, 6)
    x = x.flatten(1, 2).flatten(2, 3)
    return torch.roll(x, (where.shift_h, where.shift_w), (1, 2)) if where.shifted else x


def regions(where: Geometry) -> Tensor:
    """Number the sides of the shift's cuts, `[H, W]`: a window that joins two sides keeps them apart."""
    late_y = torch.arange(where.height) < where.shift_h
    late_x = torch.arange(where.width) < where.shift_w
    return 2 * late_y[:, None].long() + late_x[None, :].long()


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys, zero in a row whose bias hides them all."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
