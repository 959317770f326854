"""The depthwise convolution as loops that numba compiles: the channels of a row are the vectors.

Rows are the tokens of all sequences, one after the other, `[N, D]`; a task is a range of rows of one
sequence: its number, start and end, and the first and the last row. Inside a sequence four rows and four taps
go together, so that what is loaded serves several products; near its ends one row goes at a time, and looks
each tap up in the sequence or in the past (the state beside it). README.md has the mathematics.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel


@inline
def _sigmoid(z):
    return np.float32(1.0) / (np.float32(1.0) + exp(-z))


@inline
def _inside(t, task, left, taps):
    """Whether the rows t to t + 3 are the task's and reach nothing but rows of their sequence."""
    return t - left >= task[1] and t + 3 - left + taps <= task[2] and t + 4 <= task[4]


@kernel
def _four_rows(x, s, w, bias, y, r, width):
    """The rows r to r + 3 of y, from the rows of x that begin at s."""
    for d in range(width):
        y[r, d] = bias[d]
        y[r + 1, d] = bias[d]
        y[r + 2, d] = bias[d]
        y[r + 3, d] = bias[d]
    i = 0
    while i + 4 <= w.shape[0]:
        for d in range(width):
            w0, w1, w2, w3 = w[i, d], w[i + 1, d], w[i + 2, d], w[i + 3, d]
            x0, x1, x2, x3 = x[s, d], x[s + 1, d], x[s + 2, d], x[s + 3, d]
            x4, x5, x6 = x[s + 4, d], x[s + 5, d], x[s + 6, d]
            y[r, d] += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            y[r + 1, d] += w0 * x1 + w1 * x2 + w2 * x3 + w3 * x4
            y[r + 2, d] += w0 * x2 + w1 * x3 + w2 * x4 + w3 * x5
            y[r + 3, d] += w0 * x3 + w1 * x4 + w2 * x5 + w3 * x6
        i += 4
        s += 4
    while i < w.shape[0]:
        for d in range(width):
            w0 = w[i, d]
            y[r, d] += w0 * x[s, d]
            y[r + 1, d] += w0 * x[s + 1, d]
            y[r + 2, d] += w0 * x[s + 2, d]
            y[r + 3, d] += w0 * x[s + 3, d]
        i += 1
        s += 1


@kernel
def _correlate(x, x_first, w, bias, past, y, y_first, task, left, width):
    """y_t = bias + sum over i of w_i x_{t - left + i}, for the task's rows.

    x and y begin at the rows x_first and y_first; their rows may lie further apart than their width.
    """
    t = task[3]
    while t < task[4]:
        if _inside(t, task, left, w.shape[0]):
            _four_rows(x, t - left - x_first, w, bias, y, t - y_first, width)
            t += 4
            continue
        r = t - y_first
        for d in range(width):
            y[r, d] = bias[d]
        for i in range(w.shape[0]):
            s = t - left + i
            if task[1] <= s < task[2]:
                for d in range(width):
                    y[r, d] += w[i, d] * x[s - x_first, d]
            elif past.shape[0]:
                p = s - task[1] + left if s < task[1] else s - task[2]
                for d in range(width):
                    y[r, d] += w[i, d] * past[task[0], p, d]
        t += 1


@kernel
def forward(x, w, bias, past, y, tasks, left, silu):
    """The tasks' rows of y; x may have rows longer than y's."""
    width = y.shape[1]
    for i in range(tasks.shape[0]):
        task = (tasks[i, 0], tasks[i, 1], tasks[i, 2], tasks[i, 3], tasks[i, 4])
        _correlate(x, 0, w, bias, past, y, 0, task, left, width)
        if silu:
            for t in range(task[3], task[4]):
                for d in range(width):
                    y[t, d] *= _sigmoid(y[t, d])


@kernel
def _four_rows_share(x, s, dz, r, share, width):
    """What the rows r to r + 3 of dz give to the gradients, from the rows of x that begin at s."""
    taps = share.shape[0] - 1
    for d in range(width):
        share[taps, d] += (dz[r, d] + dz[r + 1, d]) + (dz[r + 2, d] + dz[r + 3, d])
    i = 0
    while i + 4 <= taps:
        for d in range(width):
            g0, g1, g2, g3 = dz[r, d], dz[r + 1, d], dz[r + 2, d], dz[r + 3, d]
            x0, x1, x2, x3 = x[s, d], x[s + 1, d], x[s + 2, d], x[s + 3, d]
            x4, x5, x6 = x[s + 4, d], x[s + 5, d], x[s + 6, d]
            share[i, d] += g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3
            share[i + 1, d] += g0 * x1 + g1 * x2 + g2 * x3 + g3 * x4
            share[i + 2, d] += g0 * x2 + g1 * x3 + g2 * x4 + g3 * x5
            share[i + 3, d] += g0 * x3 + g1 * x4 + g2 * x5 + g3 * x6
        i += 4
        s += 4
    while i < taps:
        for d in range(width):
            g0, g1, g2, g3 = dz[r, d], dz[r + 1, d], dz[r + 2, d], dz[r + 3, d]
            share[i, d] += g0 * x[s, d] + g1 * x[s + 1, d] + g2 * x[s + 2, d] + g3 * x[s + 3, d]
        i += 1
        s += 1


@kernel
def _share(x, dz, dz_first, w, past, share, dpast, task, left, width):
    """Add what a task's rows give to the gradients of the taps, of the bias (the last row), of the past."""
    t = task[3]
    while t < task[4]:
        r = t - dz_first
        if _inside(t, task, left, w.shape[0]):
            _four_rows_share(x, t - left, dz, r, share, width)
            t += 4
            continue
        for d in range(width):
            share[w.shape[0], d] += dz[r, d]
        for i in range(w.shape[0]):
            s = t - left + i
            if task[1] <= s < task[2]:
                for d in range(width):
                    share[i, d] += dz[r, d] * x[s, d]
            elif past.shape[0]:
                p = s - task[1] + left if s < task[1] else s - task[2]
                for d in range(width):
                    share[i, d] += dz[r, d] * past[task[0], p, d]
                    dpast[task[0], p, d] += dz[r, d] * w[i, d]
        t += 1


@kernel
def backward(dy, x, w, turned, bias, past, dx, total, dpast, tasks, left, silu, vectors):
    """The tasks' rows of dx; their share of the taps' and the bias's gradients (if vectors), and dpast.

    turned is w with its taps in the opposite order; total is [W + 1, D], and zero to begin with, as dpast is.
    """
    taps, width = w.shape
    right = taps - 1 - left
    nothing = np.zeros(width, np.float32)
    outside = np.zeros((0, 0, 0), np.float32)
    share = np.empty((taps + 1, width), np.float32)
    for i in range(tasks.shape[0]):
        task = (tasks[i, 0], tasks[i, 1], tasks[i, 2], tasks[i, 3], tasks[i, 4])
        dz, first = dy, np.int64(0)
        if silu:  # also on the rows around the task's that its rows of dx reach
            first = max(task[1], task[3] - right)
            around = (task[0], task[1], task[2], first, min(task[2], task[4] + left))
            dz = np.empty((around[4] - first, width), np.float32)
            _correlate(x, 0, w, bias, past, dz, first, around, left, width)
            for r in range(dz.shape[0]):
                for d in range(width):
                    s = _sigmoid(dz[r, d])
                    dz[r, d] = dy[first + r, d] * (s + s * (np.float32(1.0) - s) * dz[r, d])
        _correlate(dz, first, turned, nothing, outside, dx, 0, task, right, width)
        if vectors:
            for t in range(task[3], task[4], 64):  # a sum of sums: its error does not grow with the rows
                share[:] = 0
                rows = (task[0], task[1], task[2], t, min(t + 64, task[4]))
                _share(x, dz, first, w, past, share, dpast, rows, left, width)
                for k in range(taps + 1):
                    for d in range(width):
                        total[k, d] += share[k, d]
