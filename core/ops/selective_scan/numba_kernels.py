"""The selective scan as compiled loops over blocks of channels: forward, and backward from saved states.

Time runs one step after the other; within a step a loop over the block's channels, the contiguous axis,
becomes vectors, for each of the N states in turn. Rows of u, delta, z, B and C are found by a row length, so
that slices of a projection need no copy. README.md has the backward's derivation.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0912, PLR0915

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@inline
def _sigmoid(x):
    return _ONE / (_ONE + exp(-x))


@inline
def _softplus(x):
    """log(1 + e^x) as max(x, 0) + log1p(e), e = exp(-|x|).

    log1p(e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, so 2 s = e - s e; e itself, exact, is most of it.
    """
    e = exp(-x if x > _ZERO else x)
    s = e / (_TWO + e)
    q = s * s
    p = q * np.float32(1 / 17) + np.float32(1 / 15)
    p = p * q + np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    return (x if x > _ZERO else _ZERO) + (e - s * (e - _TWO * (p * q)))


@inline
def _step_sizes(delta, at, bias, lo, softplus, dt):
    """Delta of one step for the block's channels, with its bias and softplus."""
    if bias.size:
        for j in range(dt.size):
            dt[j] = delta[at + j] + bias[lo + j]
    else:
        for j in range(dt.size):
            dt[j] = delta[at + j]
    if softplus:
        for j in range(dt.size):
            dt[j] = _softplus(dt[j])


@kernel
def forward(
    u, u_row, delta, delta_row, a, b, b_row, c, c_row, skip, z, z_row, bias,
    y, state, kept, starts, first, last, lo, hi, width, chunk, softplus, reverse,
):  # fmt: skip
    """y and the last states of the sequences first..last, channels lo..hi, `width` at a time.

    Empty `skip`, `z`, `bias` and `kept` stand for none. `state [S, N, D]` holds the initial states and gets
    the last ones; `kept [slots, N, D]` gets the state before every chunk of steps.
    """
    n_state = a.shape[0]
    h = np.empty((n_state, width), np.float32)
    for s in range(first, last):
        start, length = starts[s], starts[s + 1] - starts[s]
        for left in range(lo, hi, width):
            w = min(width, hi - left)
            dt, x, acc = np.empty(w, np.float32), np.empty(w, np.float32), np.empty(w, np.float32)
            for n in range(n_state):
                for j in range(w):
                    h[n, j] = state[s, n, left + j]
            for i in range(length):
                t = start + (length - 1 - i if reverse else i)
                if kept.size and i % chunk == 0:
                    slot = start // chunk + s + i // chunk
                    for n in range(n_state):
                        for j in range(w):
                            kept[slot, n, left + j] = h[n, j]
                _step_sizes(delta, t * delta_row + left, bias, left, softplus, dt)
                at = t * u_row + left
                for j in range(w):
                    x[j] = dt[j] * u[at + j]
                    acc[j] = _ZERO
                if skip.size:
                    for j in range(w):
                        acc[j] = skip[left + j] * u[at + j]
                for n in range(n_state):
                    bn, cn = b[t * b_row + n], c[t * c_row + n]
                    for j in range(w):
                        new = exp(dt[j] * a[n, left + j]) * h[n, j] + x[j] * bn
                        h[n, j] = new
                        acc[j] += new * cn
                if z.size:
                    at = t * z_row + left
                    for j in range(w):
                        y[t, left + j] = acc[j] * (z[at + j] * _sigmoid(z[at + j]))
                else:
                    for j in range(w):
                        y[t, left + j] = acc[j]
            for n in range(n_state):
                for j in range(w):
                    state[s, n, left + j] = h[n, j]


@kernel
def backward(
    dy, u, u_row, delta, delta_row, a, b, b_row, c, c_row, skip, z, z_row, bias, kept,
    du, ddelta, dz, da, db, dc, dskip, dbias, dstate,
    starts, first, last, lo, hi, width, chunk, softplus, reverse,
):  # fmt: skip
    """The gradients of the sequences first..last, channels lo..hi: a chunk's states again, then back over it.

    `dstate [S, N, D]` holds the gradients of the last states and gets those of the initial ones. Added to are
    this part's own sums, `da [N, D]`, `dskip [D]` and `dbias [D]` in float64, and `db, dc [T, N]`.
    """
    n_state = a.shape[0]
    for s in range(first, last):
        start, length = starts[s], starts[s + 1] - starts[s]
        for left in range(lo, hi, width):
            w = min(width, hi - left)
            h = np.empty((chunk + 1, n_state, w), np.float32)
            decay = np.empty((chunk, n_state, w), np.float32)
            dt = np.empty((chunk, w), np.float32)
            x = np.empty((chunk, w), np.float32)
            acc = np.empty((chunk, w), np.float32)
            g, into, rate = np.empty(w, np.float32), np.empty(w, np.float32), np.empty(w, np.float32)
            gh = np.empty((n_state, w), np.float32)
            for n in range(n_state):
                for j in range(w):
                    gh[n, j] = dstate[s, n, left + j]
            for k in range((length - 1) // chunk, -1, -1):
                begin, steps = k * chunk, min(chunk, length - k * chunk)
                slot = start // chunk + s + k
                for n in range(n_state):
                    for j in range(w):
                        h[0, n, j] = kept[slot, n, left + j]
                for i in range(steps):
                    t = start + (length - 1 - begin - i if reverse else begin + i)
                    _step_sizes(delta, t * delta_row + left, bias, left, softplus, dt[i])
                    at = t * u_row + left
                    for j in range(w):
                        x[i, j] = dt[i, j] * u[at + j]
                        acc[i, j] = _ZERO
                    for n in range(n_state):
                        bn, cn = b[t * b_row + n], c[t * c_row + n]
                        for j in range(w):
                            keep = exp(dt[i, j] * a[n, left + j])
                            new = keep * h[i, n, j] + x[i, j] * bn
                            decay[i, n, j] = keep
                            h[i + 1, n, j] = new
                            acc[i, j] += new * cn
                for i in range(steps - 1, -1, -1):
                    t = start + (length - 1 - begin - i if reverse else begin + i)
                    at = t * u_row + left
                    for j in range(w):
                        g[j] = dy[t, left + j]
                        into[j] = _ZERO
                        rate[j] = _ZERO
                    if skip.size:
                        for j in range(w):
                            acc[i, j] += skip[left + j] * u[at + j]
                    if z.size:
                        gate = t * z_row + left
                        for j in range(w):
                            share = _sigmoid(z[gate + j])
                            silu = z[gate + j] * share
                            dz[t, left + j] = g[j] * acc[i, j] * (share + silu * (_ONE - share))
                            g[j] *= silu
                    for n in range(n_state):
                        bn, cn = b[t * b_row + n], c[t * c_row + n]
                        to_b, to_c = _ZERO, _ZERO
                        for j in range(w):
                            grad = gh[n, j] + g[j] * cn
                            to_c += g[j] * h[i + 1, n, j]
                            to_b += grad * x[i, j]
                            into[j] += grad * bn
                            grad *= decay[i, n, j]
                            gh[n, j] = grad
                            grad *= h[i, n, j]
                            rate[j] += grad * a[n, left + j]
                            da[n, left + j] += np.float64(grad * dt[i, j])
                        db[t, n] += to_b
                        dc[t, n] += to_c
                    for j in range(w):
                        du[t, left + j] = into[j] * dt[i, j]
                        rate[j] += into[j] * u[at + j]
                    if skip.size:
                        for j in range(w):
                            du[t, left + j] += g[j] * skip[left + j]
                            dskip[left + j] += np.float64(g[j] * u[at + j])
                    at = t * delta_row + left
                    if softplus:
                        for j in range(w):
                            raw = delta[at + j] + (bias[left + j] if bias.size else _ZERO)
                            rate[j] *= _sigmoid(raw)
                    for j in range(w):
                        ddelta[t, left + j] = rate[j]
                    if bias.size:
                        for j in range(w):
                            dbias[left + j] += np.float64(rate[j])
            for n in range(n_state):
                for j in range(w):
                    dstate[s, n, left + j] = gh[n, j]
