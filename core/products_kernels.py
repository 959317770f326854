"""A weight's gradient, `a.t() @ b` of many rows, compiled by numba: sums stay in registers.

A tile of the result is 4 rows by 64 columns, sixteen vectors (`core.lanes`). It goes through a block of rows
that lie in the first cache, then is added to the result: long sums are cut, so that rounding stays small.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import choose, load, spread, store

BLOCK = 128
STEP = 16


@kernel
def outer(a, b, out, sums, shown, kept, first, last):
    """Rows first to last, multiples of 16, of `a.t() @ b`, and sums of a's columns; b has a multiple of 64.

    Where `shown` has rows, a is first set to zero where it is not positive, and written to `kept`.
    """
    count, width, inner = a.shape[0], a.shape[1] // STEP, b.shape[1] // STEP
    zero = spread(np.float32(0.0))
    masked = shown.shape[0] > 0
    given = kept if masked else a
    for i in range(first * inner, last * inner):
        store(out, i, zero)
    for n in range(first // STEP, last // STEP):
        store(sums, n, zero)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        for n in range(first // STEP, last // STEP):
            total = zero
            for m in range(begin, end):
                x = load(a, m * width + n)
                if masked:
                    x = choose(load(shown, m * width + n) > 0.0, x, zero)
                    store(kept, m * width + n, x)
                total = total + x
            store(sums, n, load(sums, n) + total)
        for k in range(0, inner, 4):
            for n in range(first, last, 4):
                _tile(given, b, out, begin, end, n, k, inner)


@kernel
def _tile(a, b, out, begin, end, n, k, inner):
    """Add the products of the block's rows to 4 rows and 64 columns."""
    zero = spread(np.float32(0.0))
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    r0, r1, r2, r3 = zero, zero, zero, zero
    s0, s1, s2, s3 = zero, zero, zero, zero
    for m in range(begin, end):
        i = m * inner + k
        y0, y1, y2, y3 = load(b, i), load(b, i + 1), load(b, i + 2), load(b, i + 3)
        x = spread(a[m, n])
        p0, p1, p2, p3 = p0 + x * y0, p1 + x * y1, p2 + x * y2, p3 + x * y3
        x = spread(a[m, n + 1])
        q0, q1, q2, q3 = q0 + x * y0, q1 + x * y1, q2 + x * y2, q3 + x * y3
        x = spread(a[m, n + 2])
        r0, r1, r2, r3 = r0 + x * y0, r1 + x * y1, r2 + x * y2, r3 + x * y3
        x = spread(a[m, n + 3])
        s0, s1, s2, s3 = s0 + x * y0, s1 + x * y1, s2 + x * y2, s3 + x * y3
    i = n * inner + k
    _add(out, i, p0, p1, p2, p3)
    _add(out, i + inner, q0, q1, q2, q3)
    _add(out, i + 2 * inner, r0, r1, r2, r3)
    _add(out, i + 3 * inner, s0, s1, s2, s3)


@kernel
def _add(out, i, x0, x1, x2, x3):
    store(out, i, load(out, i) + x0)
    store(out, i + 1, load(out, i + 1) + x1)
    store(out, i + 2, load(out, i + 2) + x2)
    store(out, i + 3, load(out, i + 3) + x3)
