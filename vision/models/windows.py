"""Attention inside windows of an image, with what the op leaves to its caller: dropout of the weights."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from manyheads.core.ops import attention, window_attention
from manyheads.core.ops.window_attention import reference
from manyheads.core.ops.window_attention.geometry import geometry

Pair = tuple[int, int]


def dropout_of(layer: nn.Dropout) -> float:
    """The chance that a dropout layer drops a weight now: none outside training."""
    return layer.p if layer.training else 0.0


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Pair,
    *,
    shift: Pair = (0, 0),
    partition: Literal["window", "grid"] = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend inside each window; `window_attention`, and with dropout, which it has not, dense attention.

    Args:
        q, k, v: Images of queries, keys and values.
        window: Size in tokens; of the grid, for the grid.
        shift: By how much windows are moved down and to the right.
        partition: "window" or "grid".
        bias: Of the scores, with its gradient.
        scale: Of the products; None means `1 / sqrt(D)`.
        dropout_p: Chance that a weight is dropped; then windows are copied out of the image, as timm does.

    Shape:
        q, k, v and the result `[B, H, W, heads, D]`; bias broadcasts to `[heads, n, n]`.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of q and k gives float32
    if not dropout_p:
        return window_attention(q, k, v, window, shift=shift, partition=partition, bias=bias, scale=scale)
    where = geometry(q.shape[1], q.shape[2], window, shift, partition)
    parts = [reference.split(x, where).flatten(0, 1) for x in (q, k, v)]  # [B * windows, n, heads, D]
    mask = None
    if where.shifted:
        sides = reference.regions(where).to(q.device)[None, :, :, None, None]
        side = reference.split(sides, where)[0, :, :, 0, 0]  # [windows, n]
        mask = (side[:, :, None] == side[:, None, :])[:, None].repeat(q.shape[0], 1, 1, 1)
    out = attention(*parts, bias=bias, mask=mask, scale=scale, dropout_p=dropout_p)
    return reference.join(out.unflatten(0, (q.shape[0], -1)), where)
