"""The row norms on a CPU: one or two passes forward, and a backward that works block by block in the cache.

torch composes RMSNorm from single operations on a CPU, each a trip to memory and each with its own backward;
here the forward is a norm and a scaling, and the backward (README.md) keeps a block of rows in the cache for
its five steps. torch's LayerNorm is fused, and its kernels are used, but block by block too: over all rows at
once they sum the gradients of weight and bias one row after the other, in the half type if x has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a block of rows: with its gradient and two buffers, it stays within a core's second-level cache.
_BLOCK = 1 << 17
# From this row length on torch's LayerNorm backward holds the float64 rule; in shorter rows too much cancels.
_FUSED_FROM = 32


def few_rows(d: int) -> int:
    """How many rows torch's LayerNorm may add up one after the other and still hold the float64 rule."""
    return 256 if d >= 64 else 128


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of x + residual.

    Args:
        eps: Added to the mean square.
        kind: "rms", "layer" or "crms".

    Shape:
        x, residual, y, z: `[..., d]`; weight, bias: `[d]`; stats: `[2, rows]`, float32.

    Returns:
        y; z = x + residual (x itself without a residual); stats: each row's 1/rms, and its shift (the mean
        for "layer", the sum for "crms", zero for "rms").
    """
    z = x if residual is None else x + residual
    rows = z.reshape(-1, z.shape[-1]).float()  # [R, d]
    scale, offset = _float(weight), _float(bias)
    if kind == "layer":
        y, shift, rstd = torch.native_layer_norm(rows, rows.shape[1:], scale, offset, eps)
    else:
        rstd, shift = _statistics(rows, eps, kind)  # [R, 1] each
        y = rows * rstd
        if scale is not None:
            y.mul_(scale)
        if offset is not None:
            y.add_(offset)
    return y.to(z.dtype).view(z.shape), z, torch.stack((rstd[:, 0], shift[:, 0]))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _statistics(rows: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    d = rows.shape[-1]
    square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
    if kind == "rms":
        return square.div_(d).add_(eps).rsqrt_(), torch.zeros_like(square)
    total = rows.sum(-1, keepdim=True)
    return square.addcmul_(total, total).div_(d + 1).add_(eps).rsqrt_(), total


def backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    kind: str,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """Pull the gradients of y and z back to the sum, the weight and the bias.

    Args:
        dz: The gradient that reaches z directly; None where the norm had no residual.
        z, stats: From `forward`.
        affine: Whether the weight's and the bias's gradients are wanted.

    Returns:
        The gradient of z (so of x and of the residual), in z's dtype; those of the weight and of the bias as
        `[2, d]`, float32, or `[0, d]` where they are not wanted.
    """
    d = z.shape[-1]
    grad, rows = dy.reshape(-1, d), z.reshape(-1, d)
    direct = None if dz is None else dz.reshape(-1, d)
    out = torch.empty(rows.shape, dtype=z.dtype, device=z.device)
    size = max(1, _BLOCK // d)
    if kind == "layer" and affine:
        size = min(size, few_rows(d))
    starts = range(0, rows.shape[0], size)
    shares = torch.zeros(len(starts) if affine else 0, 2, d, device=z.device)
    scale = _float(weight)
    for i, start in enumerate(starts):
        block = slice(start, start + size)
        share = shares[i] if affine else None
        part = _block(grad[block].float(), rows[block].float(), stats[:, block], scale, kind, share)
        if direct is None:
            out[block] = part
        else:
            torch.add(part, direct[block], out=out[block])
    return out.view(z.shape), shares.sum(0) if affine else shares[:, 0]


def _block(
    grad: Tensor, rows: Tensor, stats: Tensor, weight: Tensor | None, kind: str, share: Tensor | None
) -> Tensor:
    """One block's gradient of z, [r, d]; its share of the weight's and the bias's goes to share, [2, d]."""
    d = rows.shape[-1]
    rstd, shift = stats[0, :, None], stats[1, :, None]
    if kind == "layer":
        if weight is not None and d >= _FUSED_FROM:
            return _fused_block(grad, rows, rstd, shift, weight, share)
        rows = rows - shift
    product = grad * rows
    scaled = grad if weight is None else grad * weight
    inner = product.sum(-1, keepdim=True) if weight is None else torch.mv(product, weight)[:, None]
    if share is not None:
        torch.sum(product.mul_(rstd), 0, out=share[0])
        torch.sum(grad, 0, out=share[1])
    # One factor at a time: the cube of a small 1/rms underflows.
    pull = inner.mul_(rstd).mul_(rstd).mul_(rstd).div_(-(d + 1 if kind == "crms" else d))  # [r, 1]
    out = torch.mul(scaled, rstd, out=product).addcmul_(rows, pull)
    if kind == "crms":
        out.addcmul_(shift, pull)
    elif kind == "layer":
        out.sub_(scaled.mean(-1, keepdim=True).mul_(rstd))
    return out


def _fused_block(
    grad: Tensor, rows: Tensor, rstd: Tensor, mean: Tensor, weight: Tensor, share: Tensor | None
) -> Tensor:
    wanted = [True, share is not None, share is not None]
    out, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad, rows, rows.shape[1:], mean, rstd, weight, weight, wanted
    )
    if share is not None:
        share[0], share[1] = dw, db
    return out
