"""Products of a block of rows and a small matrix, compiled by numba: sums stay in registers.

For kernels that do several things with a block while it lies in the first cache. A tile is 4 rows by 64
columns, sixteen vectors (`core.lanes`); what is left of the columns goes 16 at a time, of the rows one at a
time. Every number's sum has the same order wherever the block begins.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import load, spread, store


@kernel
def add_product(a, i, weight, out, o, rows):
    """`out[o:o+rows] += a[i:i+rows] @ weight`; weight `[K, N]`, N a multiple of 16."""
    inner = out.shape[1] // 16
    whole, fours = rows - rows % 4, inner - inner % 4
    for n in range(0, fours, 4):
        for m in range(0, whole, 4):
            _four_by_four(a, i + m, weight, out, o + m, n, inner)
        for m in range(whole, rows):
            _one_by_four(a, i + m, weight, out, o + m, n, inner)
    for n in range(fours, inner):
        for m in range(rows):
            _one_by_one(a, i + m, weight, out, o + m, n, inner)


@kernel
def _four_by_four(a, i, weight, out, o, n, inner):
    at = o * inner + n
    p0, p1, p2, p3 = load(out, at), load(out, at + 1), load(out, at + 2), load(out, at + 3)
    at += inner
    q0, q1, q2, q3 = load(out, at), load(out, at + 1), load(out, at + 2), load(out, at + 3)
    at += inner
    r0, r1, r2, r3 = load(out, at), load(out, at + 1), load(out, at + 2), load(out, at + 3)
    at += inner
    s0, s1, s2, s3 = load(out, at), load(out, at + 1), load(out, at + 2), load(out, at + 3)
    for k in range(a.shape[1]):
        w = k * inner + n
        y0, y1, y2, y3 = load(weight, w), load(weight, w + 1), load(weight, w + 2), load(weight, w + 3)
        x = spread(a[i, k])
        p0, p1, p2, p3 = p0 + x * y0, p1 + x * y1, p2 + x * y2, p3 + x * y3
        x = spread(a[i + 1, k])
        q0, q1, q2, q3 = q0 + x * y0, q1 + x * y1, q2 + x * y2, q3 + x * y3
        x = spread(a[i + 2, k])
        r0, r1, r2, r3 = r0 + x * y0, r1 + x * y1, r2 + x * y2, r3 + x * y3
        x = spread(a[i + 3, k])
        s0, s1, s2, s3 = s0 + x * y0, s1 + x * y1, s2 + x * y2, s3 + x * y3
    at = o * inner + n
    _put(out, at, p0, p1, p2, p3)
    _put(out, at + inner, q0, q1, q2, q3)
    _put(out, at + 2 * inner, r0, r1, r2, r3)
    _put(out, at + 3 * inner, s0, s1, s2, s3)


@kernel
def _one_by_four(a, i, weight, out, o, n, inner):
    at = o * inner + n
    p0, p1, p2, p3 = load(out, at), load(out, at + 1), load(out, at + 2), load(out, at + 3)
    for k in range(a.shape[1]):
        w = k * inner + n
        x = spread(a[i, k])
        p0, p1 = p0 + x * load(weight, w), p1 + x * load(weight, w + 1)
        p2, p3 = p2 + x * load(weight, w + 2), p3 + x * load(weight, w + 3)
    _put(out, at, p0, p1, p2, p3)


@kernel
def _one_by_one(a, i, weight, out, o, n, inner):
    total = load(out, o * inner + n)
    for k in range(a.shape[1]):
        total = total + spread(a[i, k]) * load(weight, k * inner + n)
    store(out, o * inner + n, total)


@kernel
def _put(out, at, x0, x1, x2, x3):
    store(out, at, x0)
    store(out, at + 1, x1)
    store(out, at + 2, x2)
    store(out, at + 3, x3)


@kernel
def add_outer(a, i, b, j, out, rows, first, last):
    """`out[first:last] += a[i:i+rows, first:last].t() @ b[j:j+rows]`; columns of both multiples of 16."""
    inner = b.shape[1] // 16
    fours = inner - inner % 4
    for k in range(0, fours, 4):
        for n in range(first, last, 4):
            _outer_four(a, i, b, j, out, rows, n, k, inner)
    for k in range(fours, inner):
        for n in range(first, last, 4):
            _outer_one(a, i, b, j, out, rows, n, k, inner)


@kernel
def _outer_four(a, i, b, j, out, rows, n, k, inner):
    zero = spread(np.float32(0.0))
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    r0, r1, r2, r3 = zero, zero, zero, zero
    s0, s1, s2, s3 = zero, zero, zero, zero
    for m in range(rows):
        at = (j + m) * inner + k
        y0, y1, y2, y3 = load(b, at), load(b, at + 1), load(b, at + 2), load(b, at + 3)
        x = spread(a[i + m, n])
        p0, p1, p2, p3 = p0 + x * y0, p1 + x * y1, p2 + x * y2, p3 + x * y3
        x = spread(a[i + m, n + 1])
        q0, q1, q2, q3 = q0 + x * y0, q1 + x * y1, q2 + x * y2, q3 + x * y3
        x = spread(a[i + m, n + 2])
        r0, r1, r2, r3 = r0 + x * y0, r1 + x * y1, r2 + x * y2, r3 + x * y3
        x = spread(a[i + m, n + 3])
        s0, s1, s2, s3 = s0 + x * y0, s1 + x * y1, s2 + x * y2, s3 + x * y3
    at = n * inner + k
    _add(out, at, p0, p1, p2, p3)
    _add(out, at + inner, q0, q1, q2, q3)
    _add(out, at + 2 * inner, r0, r1, r2, r3)
    _add(out, at + 3 * inner, s0, s1, s2, s3)


@kernel
def _outer_one(a, i, b, j, out, rows, n, k, inner):
    zero = spread(np.float32(0.0))
    p, q, r, s = zero, zero, zero, zero
    for m in range(rows):
        y = load(b, (j + m) * inner + k)
        p, q = p + spread(a[i + m, n]) * y, q + spread(a[i + m, n + 1]) * y
        r, s = r + spread(a[i + m, n + 2]) * y, s + spread(a[i + m, n + 3]) * y
    at = n * inner + k
    store(out, at, load(out, at) + p)
    store(out, at + inner, load(out, at + inner) + q)
    store(out, at + 2 * inner, load(out, at + 2 * inner) + r)
    store(out, at + 3 * inner, load(out, at + 3 * inner) + s)


@kernel
def _add(out, at, x0, x1, x2, x3):
    store(out, at, load(out, at) + x0)
    store(out, at + 1, load(out, at + 1) + x1)
    store(out, at + 2, load(out, at + 2) + x2)
    store(out, at + 3, load(out, at + 3) + x3)
