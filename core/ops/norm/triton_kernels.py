"""The row norms as Triton kernels: one trip to memory each way, the residual add included.

Forward: a program normalises a tile of whole rows. Backward: each of a fixed number of programs walks its
tiles and keeps its share of the weight's and the bias's gradient in registers. README.md has the mathematics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    z,
    stats,
    count,
    x_row,
    residual_row,
    eps,
    d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and the statistics of a tile of rows; z too where there is a residual."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: rows x d may pass 2^31
    col = tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (col < d)[None, :]
    at = row[:, None] * d + col[None, :]
    v = tl.load(x + row[:, None] * x_row + col[None, :], mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if residual is not None:
        v += tl.load(residual + row[:, None] * residual_row + col[None, :], mask, other=0.0).to(tl.float32)
        stored = v.to(z.dtype.element_ty)
        tl.store(z + at, stored, mask)
        v = stored.to(tl.float32)  # the norm of what the backward will read
    shift = tl.zeros([ROWS], tl.float32)
    if KIND == "layer":
        shift = tl.sum(v, 1) / d
        v = tl.where(mask, v - shift[:, None], 0.0)
        square = tl.sum(v * v, 1) / d
    elif KIND == "crms":
        shift = tl.sum(v, 1)
        square = (tl.sum(v * v, 1) + shift * shift) / (d + 1)
    else:
        square = tl.sum(v * v, 1) / d
    rstd = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    tl.store(stats + row, rstd, row < count)
    tl.store(stats + count + row, shift, row < count)
    v *= rstd[:, None]
    if weight is not None:
        v *= tl.load(weight + col, col < d, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + col, col < d, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def backward_kernel(
    dy,
    dz,
    z,
    stats,
    weight,
    out,
    shares,
    count,
    dy_row,
    dz_row,
    z_row,
    d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of z, tile by tile, and the share of the vectors' gradients that this program saw."""
    first = tl.program_id(0)
    step = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    if weight is not None:
        w = tl.load(weight + col, col < d, other=0.0).to(tl.float32)[None, :]
    for tile in range(first, tl.cdiv(count, ROWS), step):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < count
        mask = inside[:, None] & (col < d)[None, :]
        rstd = tl.load(stats + row, inside, other=0.0)[:, None]
        shift = tl.load(stats + count + row, inside, other=0.0)[:, None]
        g = tl.load(dy + row[:, None] * dy_row + col[None, :], mask, other=0.0).to(tl.float32)
        v = tl.load(z + row[:, None] * z_row + col[None, :], mask, other=0.0).to(tl.float32)
        if KIND == "layer":
            v = tl.where(mask, v - shift, 0.0)
        if shares is not None:
            dw += g * (v * rstd)
            db += g
        if weight is not None:
            g *= w
        # v itself, not the rounded v * rstd: what follows cancels in short rows. And one factor after the
        # other: the cube of a small rstd underflows.
        pull = tl.sum(g * v, 1)[:, None] * rstd * rstd * rstd
        if KIND == "layer":
            g = (g - tl.sum(g, 1)[:, None] / d) * rstd - v * (pull / d)
        elif KIND == "crms":
            g = g * rstd - (v + shift) * (pull / (d + 1))
        else:
            g = g * rstd - v * (pull / d)
        if dz is not None:
            g += tl.load(dz + row[:, None] * dz_row + col[None, :], mask, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * d + col[None, :], g.to(out.dtype.element_ty), mask)
    if shares is not None:
        tl.store(shares + first * d + col, tl.sum(dw, 0), col < d)
        tl.store(shares + (step + first) * d + col, tl.sum(db, 0), col < d)


@triton.jit(do_not_specialize=["count"])
def vectors_kernel(
    dy,
    z,
    stats,
    shares,
    count,
    dy_row,
    z_row,
    d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shares alone, a block of columns each, for rows too wide to keep their sums beside the rest."""
    first = tl.program_id(0)
    step = tl.num_programs(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(first, tl.cdiv(count, ROWS), step):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < count
        mask = inside[:, None] & (col < d)[None, :]
        g = tl.load(dy + row[:, None] * dy_row + col[None, :], mask, other=0.0).to(tl.float32)
        v = tl.load(z + row[:, None] * z_row + col[None, :], mask, other=0.0).to(tl.float32)
        if KIND == "layer":
            v -= tl.load(stats + count + row, inside, other=0.0)[:, None]
        dw += g * (v * tl.load(stats + row, inside, other=0.0)[:, None])  # g is zero outside the mask
        db += g
    tl.store(shares + first * d + col, tl.sum(dw, 0), col < d)
    tl.store(shares + (step + first) * d + col, tl.sum(db, 0), col < d)
