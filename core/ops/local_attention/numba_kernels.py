"""What local attention does between its products, as a loop that numba compiles."""

# Arrays are numpy's, with types that numba infers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel


@inline
def _largest(row, count, most):
    """The largest: a running maximum is no vector operation to the compiler, sixteen side by side are."""
    for j in range(16):
        most[j] = np.float32(-np.inf)
    whole = count - count % 16
    for c in range(0, whole, 16):
        for j in range(16):
            most[j] = row[c + j] if row[c + j] > most[j] else most[j]
    top = np.float32(-np.inf)
    for j in range(16):
        top = most[j] if most[j] > top else top
    for j in range(whole, count):
        top = row[j] if row[j] > top else top
    return top


@kernel
def weigh(scores, far, places, index, total, first, key, window, scale):
    """Turn products `[H, S, T]` into weights that are still to be divided by their sums `total [H, S]`.

    The queries are those from the place `first` on, the keys those from `key` on; `places [T]` says so again,
    with infinity for a key that no band shows. The global keys' products are `far [H, S, G]`, those with an
    `index [G]` below 0 of no key.
    """
    heads, rows, keys = scores.shape
    hidden, zero = np.float32(-np.inf), np.float32(0.0)
    reach = np.float32(window)
    row, most = np.empty(keys, np.float32), np.empty(16, np.float32)
    for h in range(heads):
        for i in range(rows):
            own = np.float32(first + i)
            # What the band can reach, in whole vectors; slices, since indices from 0 on need no check.
            start = max(0, first + i - window - key) // 32 * 32
            stop = min(keys, (first + i + window - key) // 32 * 32 + 32)
            line, place = scores[h, i, start:stop], places[start:stop]
            count = len(line)
            for j in range(count):
                row[j] = line[j] * scale if abs(place[j] - own) <= reach else hidden
            top = _largest(row, count, most)
            for g in range(far.shape[2]):
                far[h, i, g] = far[h, i, g] * scale if index[g] >= 0 else hidden
                top = far[h, i, g] if far[h, i, g] > top else top
            # Nothing above minus infinity: exp(-inf - 0) is zero, and NaN stays NaN.
            top = zero if top == hidden else top
            found = zero
            for j in range(count):
                row[j] = exp(row[j] - top)
                found += row[j]
            for j in range(count):
                line[j] = row[j]
            scores[h, i, :start] = zero
            scores[h, i, stop:] = zero
            for g in range(far.shape[2]):
                far[h, i, g] = exp(far[h, i, g] - top)
                found += far[h, i, g]
            total[h, i] = found
