"""Products of a block of rows and a small matrix, compiled by numba: sums stay in registers.

For kernels that do several things with a block while it lies in the first cache. A tile is 4 rows by 64
columns, sixteen vectors (`core.lanes`); what is left of the columns goes 16 at a time, of the rows one at a
time. Every number's sum has the same order wherever the block begins.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import load, spread, spread_from, store


@kernel
def add_product(a, i, weight, out, o, rows):
    """`out[o:o+rows] += a[i:i+rows] @ weight`; weight `[K, N]`, N a multiple of 16."""
    width = a.shape[1]
    whole = rows - rows % 4
    for n in range(0, out.shape[1] // 16, 4):
        for m in range(0, whole, 4):
            _tile(a, (i + m) * width, width, 1, width, weight, 0, out, o + m, n)
        for m in range(whole, rows):
            _row(a, (i + m) * width, width, weight, out, o + m, n)


@kernel
def add_outer(a, i, b, j, out, rows, first, last):
    """`out[first:last] += a[i:i+rows, first:last].t() @ b[j:j+rows]`; columns of both multiples of 16."""
    width = a.shape[1]
    for k in range(0, b.shape[1] // 16, 4):
        for n in range(first, last, 4):
            _tile(a, i * width + n, 1, width, rows, b, j, out, n, k)


@kernel
def _tile(a, at, down, along, count, b, j, out, o, n):
    """Add to 4 rows of out, and 4 vectors or what is left of them, from vector n on: sums over b's rows.

    What a row is multiplied by lies in a, flattened: `down` apart from row to row, `along` from sum to sum.
    """
    inner = out.shape[1] // 16
    if inner - n < 4:
        for c in range(n, inner):
            _thin(a, at, down, along, count, b, j, out, o, c)
        return
    zero = spread(np.float32(0.0))
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    r0, r1, r2, r3 = zero, zero, zero, zero
    s0, s1, s2, s3 = zero, zero, zero, zero
    for m in range(count):
        y = (j + m) * inner + n
        y0, y1, y2, y3 = load(b, y), load(b, y + 1), load(b, y + 2), load(b, y + 3)
        i = at + m * along
        x = spread_from(a, i)
        p0, p1, p2, p3 = p0 + x * y0, p1 + x * y1, p2 + x * y2, p3 + x * y3
        x = spread_from(a, i + down)
        q0, q1, q2, q3 = q0 + x * y0, q1 + x * y1, q2 + x * y2, q3 + x * y3
        x = spread_from(a, i + 2 * down)
        r0, r1, r2, r3 = r0 + x * y0, r1 + x * y1, r2 + x * y2, r3 + x * y3
        x = spread_from(a, i + 3 * down)
        s0, s1, s2, s3 = s0 + x * y0, s1 + x * y1, s2 + x * y2, s3 + x * y3
    i = o * inner + n
    _add(out, i, p0, p1, p2, p3)
    _add(out, i + inner, q0, q1, q2, q3)
    _add(out, i + 2 * inner, r0, r1, r2, r3)
    _add(out, i + 3 * inner, s0, s1, s2, s3)


@kernel
def _thin(a, at, down, along, count, b, j, out, o, c):
    """The same of one vector."""
    inner, zero = out.shape[1] // 16, spread(np.float32(0.0))
    p, q, r, s = zero, zero, zero, zero
    for m in range(count):
        y, i = load(b, (j + m) * inner + c), at + m * along
        p, q = p + spread_from(a, i) * y, q + spread_from(a, i + down) * y
        r, s = r + spread_from(a, i + 2 * down) * y, s + spread_from(a, i + 3 * down) * y
    i = o * inner + c
    store(out, i, load(out, i) + p)
    store(out, i + inner, load(out, i + inner) + q)
    store(out, i + 2 * inner, load(out, i + 2 * inner) + r)
    store(out, i + 3 * inner, load(out, i + 3 * inner) + s)


@kernel
def _row(a, at, count, b, out, o, n):
    """The same of one row of a product."""
    inner = out.shape[1] // 16
    for c in range(n, min(n + 4, inner)):
        total = spread(np.float32(0.0))
        for m in range(count):
            total = total + spread_from(a, at + m) * load(b, m * inner + c)
        store(out, o * inner + c, load(out, o * inner + c) + total)


@kernel
def _add(out, i, x0, x1, x2, x3):
    store(out, i, load(out, i) + x0)
    store(out, i + 1, load(out, i + 1) + x1)
    store(out, i + 2, load(out, i + 2) + x2)
    store(out, i + 3, load(out, i + 3) + x3)
