"""Batch norm of a sum, in training, compiled by numba: `norm(x + y)` and its gradient.

A part of the work is a range of columns, 16 at a time in one vector (`core.lanes`). Rows go through in blocks
that stay in the cache; a block's mean and spread are merged into those of the rows before it (Chan, Golub and
LeVeque 1979): exact for columns far from zero too.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import load, spread, sqrt, store

BLOCK = 64
SHORT = 16  # rows of a gradient that are summed up in turn


@kernel
def normalise(x, y, weight, bias, running_mean, running_var, momentum, eps, mean, inverse, out, first, last):
    """Columns 16 * first to 16 * last; y becomes x + y. The running statistics move on."""
    rows, width = y.shape[0], y.shape[1] // 16
    zero, count = spread(np.float32(0.0)), np.float32(rows)
    for c in range(first, last):
        store(mean, c, zero)
        store(inverse, c, zero)  # for now, the sum of squared distances from the mean
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        before, own = np.float32(begin), np.float32(end - begin)
        share = own / np.float32(end)
        for c in range(first, last):
            total, start = zero, load(x, begin * width + c) + load(y, begin * width + c)
            for m in range(begin, end):
                i = m * width + c
                both = load(x, i) + load(y, i)
                store(y, i, both)
                total = total + (both - start)  # small numbers, where a column is far from zero
            middle = start + total / own
            squares = zero
            for m in range(begin, end):
                away = load(y, m * width + c) - middle
                squares = squares + away * away
            away = middle - load(mean, c)
            store(mean, c, load(mean, c) + away * share)
            store(inverse, c, load(inverse, c) + squares + away * away * (before * share))
    for c in range(first, last):
        squares = load(inverse, c)
        spread_out = squares / max(count - np.float32(1.0), np.float32(1.0))
        kept = np.float32(1.0) - momentum
        store(running_mean, c, load(running_mean, c) * kept + load(mean, c) * momentum)
        store(running_var, c, load(running_var, c) * kept + spread_out * momentum)
        store(inverse, c, 1.0 / sqrt(squares / count + eps))
    for m in range(rows):
        for c in range(first, last):
            scale = load(inverse, c) * load(weight, c)
            moved = (load(y, m * width + c) - load(mean, c)) * scale + load(bias, c)
            store(out, m * width + c, moved)


@kernel
def normalise_backward(grad, total, weight, mean, inverse, dtotal, dweight, dbias, first, last):
    """Gradients of the sum, the weight and the bias; columns as in `normalise`."""
    rows, width = total.shape[0], total.shape[1] // 16
    zero = spread(np.float32(0.0))
    missed = np.zeros(32 * width, np.float32)  # what rounding took from the two sums (Kahan 1965)
    for c in range(first, last):
        store(dweight, c, zero)
        store(dbias, c, zero)
    for begin in range(0, rows, SHORT):
        for c in range(first, last):
            plain, along, middle, scale = zero, zero, load(mean, c), load(inverse, c)
            for m in range(begin, min(begin + SHORT, rows)):
                g = load(grad, m * width + c)
                plain = plain + g
                along = along + g * ((load(total, m * width + c) - middle) * scale)
            _add(dbias, missed, c, c, plain)
            _add(dweight, missed, c, width + c, along)
    count, means = np.float32(rows), missed
    for c in range(first, last):
        store(means, c, load(dbias, c) / count)
        store(means, width + c, load(dweight, c) * load(inverse, c) / count)
    for m in range(rows):
        for c in range(first, last):
            away = load(total, m * width + c) - load(mean, c)
            g = load(grad, m * width + c) - load(means, c) - away * load(means, width + c)
            store(dtotal, m * width + c, g * (load(inverse, c) * load(weight, c)))


@kernel
def _add(sums, missed, c, place, x):
    """Add to a sum, and what was missed before."""
    before, x = load(sums, c), x - load(missed, place)
    after = before + x
    store(missed, place, (after - before) - x)
    store(sums, c, after)
