"""What is done to blocks of rows between products, compiled by numba: sums, ReLUs, batch norms and gradients.

For kernels that take a block through several steps while it lies in the first cache; columns are multiples of
16 (`core.lanes`). Sums over all rows are taken part by part, so that they do not depend on how parts were
shared out to threads; a part's are those of its blocks: long sums are cut, and rounding stays small.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import kernel
from manyheads.core.lanes import choose, load, spread, store

BLOCK = 64  # rows
SHORT = 16  # rows of a gradient that are summed up in turn


@kernel
def merge(parts, counts, eps, momentum, norm, running_mean, running_var):
    """Set mean and 1 / deviation in a norm's first two rows from all parts; move the running ones.

    A part is merged into those before it (Chan, Golub and LeVeque 1979): exact for columns far from zero.
    """
    kept = 1.0 - momentum
    for c in range(norm.shape[1]):
        rows, mean, squares = np.float64(0.0), np.float64(0.0), np.float64(0.0)
        for part in range(parts.shape[0]):
            if counts[part] == 0:
                continue
            before, rows = rows, rows + counts[part]
            away = parts[part, 0, c] - mean
            mean += away * counts[part] / rows
            squares += parts[part, 1, c] + away * away * before * counts[part] / rows
        norm[0, c] = mean
        norm[1, c] = 1.0 / np.sqrt(squares / rows + eps)
        running_mean[c] = kept * running_mean[c] + momentum * mean
        running_var[c] = kept * running_var[c] + momentum * squares / max(rows - 1.0, 1.0)


@kernel
def clear(x):
    """Set all to zero."""
    for i in range(x.shape[0] * (x.shape[1] // 16)):
        store(x, i, spread(np.float32(0.0)))


@kernel
def zero(x, begin, rows):
    """Set rows to zero."""
    width = x.shape[1] // 16
    for i in range(begin * width, (begin + rows) * width):
        store(x, i, spread(np.float32(0.0)))


@kernel
def fill(bias, out, begin, rows):
    """Set rows to a bias."""
    width = out.shape[1] // 16
    for c in range(width):
        number = load(bias, c)
        for m in range(begin, begin + rows):
            store(out, m * width + c, number)


@kernel
def add(x, i, out, o, rows):
    """`out += x`, once the sums of products are there: x may be far larger."""
    width = out.shape[1] // 16
    for m in range(rows * width):
        store(out, o * width + m, load(out, o * width + m) + load(x, i * width + m))


@kernel
def relu(x, begin, rows):
    """Zero what is negative."""
    width, nothing = x.shape[1] // 16, spread(np.float32(0.0))
    for i in range(begin * width, (begin + rows) * width):
        number = load(x, i)
        store(x, i, choose(number < nothing, nothing, number))  # NaN stays


@kernel
def hide(grad, shown, rows):
    """Zero the gradient where a ReLU gave none."""
    width, nothing = grad.shape[1] // 16, spread(np.float32(0.0))
    for i in range(rows * width):
        store(grad, i, choose(load(shown, i) > nothing, load(grad, i), nothing))


@kernel
def measure(x, begin, rows, part, before):
    """Merge a block's mean and squared distances into those of the part's rows before it."""
    width, nothing = x.shape[1] // 16, spread(np.float32(0.0))
    own = np.float32(rows)
    share, weight = own / np.float32(before + rows), np.float32(before)
    for c in range(width):
        total, start = nothing, load(x, begin * width + c)
        for m in range(begin, begin + rows):
            total = total + (load(x, m * width + c) - start)  # small numbers, where a column is far from zero
        middle = start + total / own
        squares = nothing
        for m in range(begin, begin + rows):
            away = load(x, m * width + c) - middle
            squares = squares + away * away
        if before == 0:
            store(part, c, middle)
            store(part, width + c, squares)
        else:
            away = middle - load(part, c)
            store(part, c, load(part, c) + away * share)
            store(part, width + c, load(part, width + c) + squares + away * away * (weight * share))


@kernel
def normalise(x, i, norm, out, o, rows):
    """Normed rows; norm has the rows mean, 1 / deviation, weight and bias."""
    width = out.shape[1] // 16
    for c in range(width):
        mean, bias = load(norm, c), load(norm, 3 * width + c)
        scale = load(norm, width + c) * load(norm, 2 * width + c)
        for m in range(rows):
            store(out, (o + m) * width + c, (load(x, (i + m) * width + c) - mean) * scale + bias)


@kernel
def gradient_sums(grad, g, x, i, norm, rows, part):
    """Add a block's sums of the gradient, and of the gradient times the normed rows."""
    width, nothing = x.shape[1] // 16, spread(np.float32(0.0))
    for c in range(width):
        sum0, sum1, mean, scale = load(part, c), load(part, width + c), load(norm, c), load(norm, width + c)
        for begin in range(0, rows, SHORT):
            plain, along = nothing, nothing
            for m in range(begin, min(begin + SHORT, rows)):
                number = load(grad, (g + m) * width + c)
                plain = plain + number
                along = along + number * ((load(x, (i + m) * width + c) - mean) * scale)
            sum0, sum1 = sum0 + plain, sum1 + along
        store(part, c, sum0)
        store(part, width + c, sum1)


@kernel
def column_sums(x, begin, rows, part):
    """Add a block's sums of columns."""
    width = x.shape[1] // 16
    for c in range(width):
        total = spread(np.float32(0.0))
        for m in range(begin, begin + rows):
            total = total + load(x, m * width + c)
        store(part, c, load(part, c) + total)


@kernel
def normalise_backward(grad, g, x, norm, sums, out, o, rows):
    """The norm's gradient; rows 2 and 3 of sums: the means of what `gradient_sums` adds up."""
    width = out.shape[1] // 16
    for c in range(width):
        mean, scale = load(norm, c), load(norm, width + c)
        plain, along = load(sums, 2 * width + c), load(sums, 3 * width + c) * scale
        gain = scale * load(norm, 2 * width + c)
        for m in range(rows):
            away = load(x, (g + m) * width + c) - mean
            store(out, (o + m) * width + c, (load(grad, (g + m) * width + c) - plain - away * along) * gain)
