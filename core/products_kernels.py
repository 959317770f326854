"""A weight's gradient, `a.t() @ b` of many rows, compiled by numba: sums stay in registers.

A tile of the result is 4 rows by 64 columns, sixteen vectors (`core.lanes`). It goes through a block of rows
that lie in the first cache, then is added to the result: long sums are cut, so that rounding stays small.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import choose, load, spread, store
from manyheads.core.tiles import add_outer

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
        add_outer(given, begin, b, begin, out, end - begin, first, last)
