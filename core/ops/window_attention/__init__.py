"""Attention inside the windows of an image, read from the image as it lies: no roll, no partition.

The mathematics, and what is done about sizes that windows do not divide, is in README.md beside this file.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.window_attention import reference
from manyheads.core.ops.window_attention.custom_op import window_attention_op
from manyheads.core.ops.window_attention.geometry import Geometry, Pair, Partition, geometry

__all__ = ["window_attention"]


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
    """Attend inside each window of an image: `softmax(scale * q k^T + bias) v` over its n tokens.

    Args:
        q, k, v: Images of queries, keys and values; views of one fused projection are read where they lie.
        window: Size in tokens, one number or (height, width). For "grid" the size of the grid, which is that
            of a window too; for the stripes, one number: their width.
        shift: Moves the windows down and to the right, by less than their size. Where a window then joins
            opposite borders of the image, tokens of different sides do not see each other (Swin).
        partition: "window": neighbouring tokens (Swin, MaxViT's blocks). "grid": tokens spread evenly over
            the image, at distances `H / height`, `W / width` (MaxViT). "stripe_h", "stripe_v": horizontal
            stripes `window x W`, vertical ones `H x window` (CSWin; axial attention with 1).
        bias: Added to the scores of every window, with its gradient; its tokens are counted row by row.
        scale: Of the products; None means `1 / sqrt(D)`.

    Shape:
        q, k, v and the result `[B, H, W, heads, D]`; bias broadcasts to `[heads, n, n]`. H and W are
        multiples of the window.

    Raises:
        TypeError: q, k, v are not of one floating dtype, or bias is not floating, or window or shift no ints.
        ValueError: A shape, a device, `partition`, or sizes that do not fit the image.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Liu et al. 2021 (Swin, arXiv 2103.14030); Tu et al. 2022 (MaxViT, arXiv 2204.01697); Dong et al. 2021
        (CSWin, arXiv 2107.00652); Ho et al. 2019 (axial, arXiv 1912.12180).

    Example:
        >>> qkv = torch.randn(2, 56, 56, 3, 3, 32)  # a projection's output, [B, H, W, 3, heads, D]
        >>> bias = torch.zeros(3, 49, 49, requires_grad=True)
        >>> window_attention(*qkv.unbind(3), 7, shift=3, bias=bias).shape
        torch.Size([2, 56, 56, 3, 32])
    """
    _check(q, k, v, bias)
    where = geometry(q.shape[1], q.shape[2], window, shift, partition)
    if bias is not None:
        _check_bias(bias, where, q)
    dim = q.shape[-1]  # in words: torch.compile, for which it may be a symbol, takes these for constants
    head = "narrow" if dim <= 128 else "wide" if dim <= 256 else "widest"
    backend = choose("window_attention", device=q.device.type, dtype=q.dtype, head=head).backend
    if backend == "reference" or q.shape[0] == 0:
        return reference.window_attention(
            q, k, v, window, shift=shift, partition=partition, bias=bias, scale=scale
        )
    if bias is not None:
        bias = bias.expand(q.shape[3], where.tokens, where.tokens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = ([where.window_h, where.window_w], [where.shift_h, where.shift_w], where.grid)
    return window_attention_op(q, k, v, bias, *sizes, scale, backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(f"window_attention: {name} must be [B, H, W, heads, D], not {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"window_attention: q, k and v must have one floating dtype; {name} is {x.dtype}, "
                f"q is {q.dtype}"
            )
        if x.shape != q.shape:
            raise ValueError(
                f"window_attention: q, k and v must have one shape; {name} is {list(x.shape)}, "
                f"q is {list(q.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"window_attention: {name} is on {x.device}, q is on {q.device}")
    if 0 in q.shape[1:]:
        raise ValueError(f"window_attention: H, W, heads and D must be at least 1, not {list(q.shape[1:])}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"window_attention: bias must be floating, not {bias.dtype}")
    if bias is not None and bias.device != q.device:
        raise ValueError(f"window_attention: bias is on {bias.device}, q is on {q.device}")


def _check_bias(bias: Tensor, where: Geometry, q: Tensor) -> None:
    scores = (q.shape[3], where.tokens, where.tokens)
    fits = bias.dim() <= 3 and all(
        size in (1, most) for size, most in zip(bias.shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"window_attention: bias {list(bias.shape)} does not broadcast to [heads, n, n] = {list(scores)}"
        )
