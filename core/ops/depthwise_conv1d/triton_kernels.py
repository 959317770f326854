"""The depthwise convolution as Triton kernels: any width, one trip to memory each way for short filters.

A program takes a tile of tokens and channels and loads it once a tap, shifted: after the first time from the
cache. Rows outside of a token's sequence are zero, or come from the past (the state). README.md has the
mathematics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(t, origin, sequences, cu_seqlens, batch, length):
    """The sequence of each row t from the origin, and where that one starts and ends, from the origin too."""
    sequence, start, end = batch + 0 * t, 0 * t - origin, length - origin + 0 * t
    if sequences is not None:
        sequence = tl.load(sequences + origin + t, t < end, other=0)
        start = tl.load(cu_seqlens + sequence) - origin
        end = tl.load(cu_seqlens + sequence + 1) - origin
    return sequence, start, end


@triton.jit
def _rows(x, past, s, sequence, start, end, wanted, col, x_row, d, taps, left):
    """The rows s of x, of the past where they lie outside of their sequence, float32; zero if not wanted."""
    inside = (s >= start) & (s < end)
    channel = (col < d)[None, :]
    v = tl.load(x + (s[:, None] * x_row + col[None, :]), (wanted & inside)[:, None] & channel, other=0.0)
    v = v.to(tl.float32)
    if past is not None:
        row = (sequence * (taps - 1) + tl.where(s < start, s - start + left, s - end)).to(tl.int64) * d
        outside = (wanted & (inside == 0))[:, None] & channel
        v += tl.load(past + row[:, None] + col[None, :], outside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _correlate(
    x, past, weight, bias, t, sequence, start, end, wanted, col, x_row, d, taps, left, GROUP: tl.constexpr
):
    """bias + sum over i of weight_i x_{t - left + i}, for the rows t that are wanted."""
    z = tl.zeros([t.shape[0], col.shape[0]], tl.float32)
    if bias is not None:
        z += tl.load(bias + col, col < d, other=0.0).to(tl.float32)[None, :]
    for first in range(0, taps, GROUP):
        for j in tl.static_range(GROUP):
            i = first + j
            v = _rows(
                x, past, t - left + i, sequence, start, end, wanted & (i < taps), col, x_row, d, taps, left
            )
            w = tl.load(weight + col * taps + i, (col < d) & (i < taps), other=0.0).to(tl.float32)
            z += w[None, :] * v
    return z


@triton.jit
def _at(x, batch, row, x_batch, x_row):
    """Where a row of a batch entry begins."""
    return x + batch.to(tl.int64) * x_batch + row.to(tl.int64) * x_row


@triton.jit
def _slope(z):
    """The derivative of SiLU."""
    s = 1.0 / (1.0 + tl.exp(-z))
    return s + s * (1.0 - s) * z


@triton.jit(do_not_specialize=["length", "taps", "left"])
def forward_kernel(
    x,
    weight,
    bias,
    past,
    dy,
    y,
    sequences,
    cu_seqlens,
    length,
    d,
    taps,
    left,
    x_batch,
    x_row,
    dy_batch,
    dy_row,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of y; or, given dy, of the gradient before SiLU, in y's place."""
    blocks = tl.cdiv(d, BLOCK)
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    batch = program // (blocks * tiles)
    origin = program // blocks % tiles * ROWS
    col = program % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, ROWS)  # from here on rows are counted from the origin: 32 bits are enough for offsets
    wanted = t < length - origin
    sequence, start, end = _bounds(t, origin, sequences, cu_seqlens, batch, length)
    z = _correlate(
        _at(x, batch, origin, x_batch, x_row),
        past,
        weight,
        bias,
        t,
        sequence,
        start,
        end,
        wanted,
        col,
        x_row,
        d,
        taps,
        left,
        GROUP,
    )
    mask = wanted[:, None] & (col < d)[None, :]
    if dy is not None:
        g = tl.load(
            _at(dy, batch, origin, dy_batch, dy_row) + t[:, None] * dy_row + col[None, :], mask, other=0.0
        )
        z = g.to(tl.float32) * _slope(z)
    elif SILU:
        z = z / (1.0 + tl.exp(-z))
    out = _at(y, batch, origin, length.to(tl.int64) * d, d) + t[:, None] * d + col[None, :]
    tl.store(out, z.to(y.dtype.element_ty), mask)


@triton.jit
def _store(share, first, sum_0, sum_1, sum_2, sum_3, offset, col, d, taps):
    """The sums of four taps, from `first` on, and once that of the bias, which is the last row."""
    own = share + first * d + col
    tl.store(own, tl.sum(sum_0, 0), col < d)
    tl.store(own + d, tl.sum(sum_1, 0), (col < d) & (first + 1 < taps))
    tl.store(own + 2 * d, tl.sum(sum_2, 0), (col < d) & (first + 2 < taps))
    tl.store(own + 3 * d, tl.sum(sum_3, 0), (col < d) & (first + 3 < taps))
    tl.store(share + taps * d + col, tl.sum(offset, 0), (col < d) & (first == 0))


@triton.jit(do_not_specialize=["length", "taps", "left", "count"])
def short_backward_kernel(
    dy,
    x,
    weight,
    bias,
    past,
    dx,
    shares,
    sequences,
    cu_seqlens,
    length,
    count,
    d,
    taps,
    left,
    x_batch,
    x_row,
    dy_batch,
    dy_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx of every tile that this program walks over, and its share of the taps' and the bias's gradients.

    The gradient before SiLU is recomputed at each shift that dx needs: with few taps that is cheaper than to
    write it down and read it again.
    """
    program = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = (col < d)[None, :]
    tiles = tl.cdiv(length, ROWS)
    offset = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_0 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_2 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_3 = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, count, tl.num_programs(1)):
        batch, origin = tile // tiles, tile % tiles * ROWS
        p = tl.arange(0, ROWS)
        wanted = p < length - origin
        sequence, start, end = _bounds(p, origin, sequences, cu_seqlens, batch, length)
        here = _at(x, batch, origin, x_batch, x_row)
        there = _at(dy, batch, origin, dy_batch, dy_row)
        pulled = tl.zeros([ROWS, BLOCK], tl.float32)
        own = tl.zeros([ROWS, BLOCK], tl.float32)
        for j in range(taps):  # not unrolled: what all shifts load together is more than the registers
            t = p + left - j
            seen = wanted & (t >= start) & (t < end)
            g = tl.load(there + (t[:, None] * dy_row + col[None, :]), seen[:, None] & channel, other=0.0)
            g = g.to(tl.float32)
            z = _correlate(
                here,
                past,
                weight,
                bias,
                t,
                sequence,
                start,
                end,
                seen,
                col,
                x_row,
                d,
                taps,
                left,
                GROUP,
            )
            g = tl.where(seen[:, None] & channel, g * _slope(z), 0.0)
            w = tl.load(weight + col * taps + j, col < d, other=0.0).to(tl.float32)
            pulled += w[None, :] * g
            own = tl.where(j == left, g, own)  # at no shift: the rows' own
        if shares is not None:
            offset += own
            s = p - left
            sum_0 += own * _rows(here, past, s, sequence, start, end, wanted, col, x_row, d, taps, left)
            need = wanted & (taps > 1)
            sum_1 += own * _rows(here, past, s + 1, sequence, start, end, need, col, x_row, d, taps, left)
            need = wanted & (taps > 2)
            sum_2 += own * _rows(here, past, s + 2, sequence, start, end, need, col, x_row, d, taps, left)
            need = wanted & (taps > 3)
            sum_3 += own * _rows(here, past, s + 3, sequence, start, end, need, col, x_row, d, taps, left)
        out = _at(dx, batch, origin, length.to(tl.int64) * d, d) + p[:, None] * d + col[None, :]
        tl.store(out, pulled.to(dx.dtype.element_ty), wanted[:, None] & channel)
    if shares is not None:
        _store(shares + program * (taps + 1) * d, 0, sum_0, sum_1, sum_2, sum_3, offset, col, d, taps)


@triton.jit(do_not_specialize=["length", "taps", "left", "count"])
def share_kernel(
    dz,
    x,
    past,
    shares,
    sequences,
    cu_seqlens,
    length,
    count,
    d,
    taps,
    left,
    x_batch,
    x_row,
    dz_batch,
    dz_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The share of four taps' gradients, and of the bias's, in the tiles that this program walks over."""
    program = tl.program_id(1)
    first = tl.program_id(2) * 4
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = (col < d)[None, :]
    tiles = tl.cdiv(length, ROWS)
    offset = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_0 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_2 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_3 = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, count, tl.num_programs(1)):
        batch, origin = tile // tiles, tile % tiles * ROWS
        t = tl.arange(0, ROWS)
        wanted = t < length - origin
        sequence, start, end = _bounds(t, origin, sequences, cu_seqlens, batch, length)
        here = _at(x, batch, origin, x_batch, x_row)
        there = _at(dz, batch, origin, dz_batch, dz_row)
        g = tl.load(there + (t[:, None] * dz_row + col[None, :]), wanted[:, None] & channel, other=0.0)
        g = g.to(tl.float32)
        offset += g
        s = t - left + first
        sum_0 += g * _rows(here, past, s, sequence, start, end, wanted, col, x_row, d, taps, left)
        need = wanted & (first + 1 < taps)
        sum_1 += g * _rows(here, past, s + 1, sequence, start, end, need, col, x_row, d, taps, left)
        need = wanted & (first + 2 < taps)
        sum_2 += g * _rows(here, past, s + 2, sequence, start, end, need, col, x_row, d, taps, left)
        need = wanted & (first + 3 < taps)
        sum_3 += g * _rows(here, past, s + 3, sequence, start, end, need, col, x_row, d, taps, left)
    _store(shares + program * (taps + 1) * d, first, sum_0, sum_1, sum_2, sum_3, offset, col, d, taps)


@triton.jit(do_not_specialize=["length", "taps", "left"])
def past_kernel(
    dz,
    x,
    weight,
    bias,
    past,
    dpast,
    cu_seqlens,
    length,
    d,
    taps,
    left,
    x_batch,
    x_row,
    dz_batch,
    dz_row,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of one sequence's past; with SILU, dz is the gradient after SiLU."""
    sequence = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = (col < d)[None, :]
    batch, start, end = sequence, sequence * 0, sequence * 0 + length
    if cu_seqlens is not None:
        batch = sequence * 0
        start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    origin = tl.where(left > 0, start, end)  # the past lies before it, or after
    here = _at(x, batch, origin, x_batch, x_row)
    there = _at(dz, batch, origin, dz_batch, dz_row)
    for first in range(0, taps - 1, ROWS):
        q = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in range(taps):
            t = q - i
            seen = (q < taps - 1) & (t >= start - origin) & (t < end - origin)
            g = tl.load(there + (t[:, None] * dz_row + col[None, :]), seen[:, None] & channel, other=0.0)
            g = g.to(tl.float32)
            if SILU:
                z = _correlate(
                    here,
                    past,
                    weight,
                    bias,
                    t,
                    sequence + 0 * t,
                    start - origin + 0 * t,
                    end - origin + 0 * t,
                    seen,
                    col,
                    x_row,
                    d,
                    taps,
                    left,
                    GROUP,
                )
                g = tl.where(seen[:, None] & channel, g * _slope(z), 0.0)
            total += tl.load(weight + col * taps + i, col < d, other=0.0).to(tl.float32)[None, :] * g
        out = _at(dpast, sequence, first + 0 * sequence, (taps - 1) * d, d)
        out += tl.arange(0, ROWS)[:, None] * d + col[None, :]
        tl.store(out, total, (q < taps - 1)[:, None] & channel)
