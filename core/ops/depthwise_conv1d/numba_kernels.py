"""The depthwise convolution as loops that numba compiles: the channels of a few rows are the vectors.

Rows are tokens of all sequences, one after the other, `[N, D]`; a task is a range of rows of one sequence.
Inside a sequence four rows and four taps go together, so that each row is loaded once for several of them;
near its ends one row at a time, each tap looked up in the sequence or in its state. README.md has the
mathematics.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel


@inline
def _sigmoid(z):
    return np.float32(1.0) / (np.float32(1.0) + exp(-z))


@kernel
def _correlate(x, x_first, w, bias, past, y, y_first, bounds, left, width):
    """y_t = bias + sum over i of w_i x_{t - left + i}, for the rows t from bounds[3] to bounds[4].

    x and y begin at the rows x_first and y_first. Outside of the sequence, bounds[1] to bounds[2], past holds
    the rows (if it has any), or they are zero. Widths are given, since rows may lie further apart.
    """
    sequence, start, end, first, last = bounds
    W = w.shape[0]
    t = first
    while t < last:
        if t - left >= start and t + 3 - left + W <= end and t + 4 <= last:
            r = t - y_first
            for d in range(width):
                y[r, d] = bias[d]
                y[r + 1, d] = bias[d]
                y[r + 2, d] = bias[d]
                y[r + 3, d] = bias[d]
            i = 0
            while i + 4 <= W:
                s = t - left + i - x_first
                for d in range(width):
                    w0, w1, w2, w3 = w[i, d], w[i + 1, d], w[i + 2, d], w[i + 3, d]
                    x0, x1, x2, x3 = x[s, d], x[s + 1, d], x[s + 2, d], x[s + 3, d]
                    x4, x5, x6 = x[s + 4, d], x[s + 5, d], x[s + 6, d]
                    y[r, d] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
                    y[r + 1, d] += w0 * x1 + w1 * x2 + w2 * x3 + w3 * x4
                    y[r + 2, d] += w0 * x2 + w1 * x3 + w2 * x4 + w3 * x5
                    y[r + 3, d] += w0 * x3 + w1 * x4 + w2 * x5 + w3 * x6
                i += 4
            while i < W:
                s = t - left + i - x_first
                for d in range(width):
                    w0 = w[i, d]
                    y[r, d] += w0 * x[s, d]
                    y[r + 1, d] += w0 * x[s + 1, d]
                    y[r + 2, d] += w0 * x[s + 2, d]
                    y[r + 3, d] += w0 * x[s + 3, d]
                i += 1
            t += 4
            continue
        r = t - y_first
        for d in range(width):
            y[r, d] = bias[d]
        for i in range(W):
            s = t - left + i
            if start <= s and s < end:
                for d in range(width):
                    y[r, d] += w[i, d] * x[s - x_first, d]
            elif past.shape[0]:
                p = s - start + left if s < start else s - end
                for d in range(width):
                    y[r, d] += w[i, d] * past[sequence, p, d]
        t += 1


@kernel
def forward(x, w, bias, past, y, tasks, left, silu):
    """The tasks' rows of y; x may have rows longer than y's."""
    width = y.shape[1]
    for task in range(tasks.shape[0]):
        b = tasks[task]
        bounds = (b[0], b[1], b[2], b[3], b[4])
        _correlate(x, 0, w, bias, past, y, 0, bounds, left, width)
        if silu:
            for t in range(bounds[3], bounds[4]):
                for d in range(width):
                    y[t, d] *= _sigmoid(y[t, d])


@kernel
def _share(x, dz, dz_first, w, past, share, dpast, bounds, left, width):
    """Add what a task's rows give to the gradients of the taps, of the bias (the last row) and of the past."""
    sequence, start, end, first, last = bounds
    W = w.shape[0]
    t = first
    while t < last:
        if t - left >= start and t + 3 - left + W <= end and t + 4 <= last:
            r = t - dz_first
            for d in range(width):
                share[W, d] += (dz[r, d] + dz[r + 1, d]) + (dz[r + 2, d] + dz[r + 3, d])
            i = 0
            while i + 4 <= W:
                s = t - left + i
                for d in range(width):
                    g0, g1, g2, g3 = dz[r, d], dz[r + 1, d], dz[r + 2, d], dz[r + 3, d]
                    x0, x1, x2, x3 = x[s, d], x[s + 1, d], x[s + 2, d], x[s + 3, d]
                    x4, x5, x6 = x[s + 4, d], x[s + 5, d], x[s + 6, d]
                    share[i, d] += g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3
                    share[i + 1, d] += g0 * x1 + g1 * x2 + g2 * x3 + g3 * x4
                    share[i + 2, d] += g0 * x2 + g1 * x3 + g2 * x4 + g3 * x5
                    share[i + 3, d] += g0 * x3 + g1 * x4 + g2 * x5 + g3 * x6
                i += 4
            while i < W:
                s = t - left + i
                for d in range(width):
                    g0, g1, g2, g3 = dz[r, d], dz[r + 1, d], dz[r + 2, d], dz[r + 3, d]
                    share[i, d] += g0 * x[s, d] + g1 * x[s + 1, d] + g2 * x[s + 2, d] + g3 * x[s + 3, d]
                i += 1
            t += 4
            continue
        r = t - dz_first
        for d in range(width):
            share[W, d] += dz[r, d]
        for i in range(W):
            s = t - left + i
            if start <= s and s < end:
                for d in range(width):
                    share[i, d] += dz[r, d] * x[s, d]
            elif past.shape[0]:
                p = s - start + left if s < start else s - end
                for d in range(width):
                    share[i, d] += dz[r, d] * past[sequence, p, d]
                    dpast[sequence, p, d] += dz[r, d] * w[i, d]
        t += 1


@kernel
def backward(dy, x, w, turned, bias, past, dx, total, dpast, tasks, left, silu, vectors):
    """The tasks' rows of dx; their share of the taps' and the bias's gradients (if vectors), and dpast.

    turned is w with its taps in the opposite order; total is [W + 1, D], and zero to begin with, as dpast is.
    """
    W, width = w.shape
    right = W - 1 - left
    nothing = np.zeros(width, np.float32)
    outside = np.zeros((0, 0, 0), np.float32)
    share = np.empty((W + 1, width), np.float32)
    for task in range(tasks.shape[0]):
        b = tasks[task]
        bounds = (b[0], b[1], b[2], b[3], b[4])
        dz, dz_first = dy, np.int64(0)
        if silu:  # on the task's rows, and on those that its rows of dx reach
            reach = (b[0], b[1], b[2], max(b[1], b[3] - right), min(b[2], b[4] + left))
            dz_first = reach[3]
            dz = np.empty((reach[4] - dz_first, width), np.float32)
            _correlate(x, 0, w, bias, past, dz, dz_first, reach, left, width)
            for r in range(dz.shape[0]):
                for d in range(width):
                    z = dz[r, d]
                    s = _sigmoid(z)
                    dz[r, d] = dy[dz_first + r, d] * (s + s * (np.float32(1.0) - s) * z)
        _correlate(dz, dz_first, turned, nothing, outside, dx, 0, bounds, right, width)
        if vectors:
            share[:] = 0  # a sum of the tasks' sums: its error grows with their number, not with the rows'
            _share(x, dz, dz_first, w, past, share, dpast, bounds, left, width)
            for i in range(W + 1):
                for d in range(width):
                    total[i, d] += share[i, d]
