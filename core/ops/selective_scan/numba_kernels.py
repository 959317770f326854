"""The selective scan as compiled loops over blocks of channels: forward, and backward from saved states.

Time runs one step after the other; within a step a loop over the block's channels, the contiguous axis,
becomes vectors, for each of the N states in turn. Rows of u, delta, z, B and C are found by a row length, so
that slices of a projection need no copy. README.md has the backward's derivation.

A block's part of a row is cut out before the loop over it: in a loop over `row[left + j]` an index might be
negative, for all that the compiler knows, and each vector would be gathered element by element.
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
def _step_sizes(delta, bias, softplus, dt):
    """Delta of one step for the block's channels, with its bias and softplus."""
    if bias.size:
        for j in range(dt.size):
            dt[j] = delta[j] + bias[j]
    else:
        for j in range(dt.size):
            dt[j] = delta[j]
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
    for s in range(first, last):
        start, length = starts[s], starts[s + 1] - starts[s]
        for left in range(lo, hi, width):
            right = min(left + width, hi)
            w = right - left
            rates, skips, biases = a[:, left:right].copy(), skip[left:right], bias[left:right]
            h = state[s, :, left:right].copy()
            dt, x, acc = np.empty(w, np.float32), np.empty(w, np.float32), np.empty(w, np.float32)
            for i in range(length):
                t = start + (length - 1 - i if reverse else i)
                if kept.size and i % chunk == 0:
                    kept[start // chunk + s + i // chunk, :, left:right] = h
                at = t * delta_row + left
                _step_sizes(delta[at : at + w], biases, softplus, dt)
                at = t * u_row + left
                ut = u[at : at + w]
                for j in range(w):
                    x[j] = dt[j] * ut[j]
                    acc[j] = _ZERO
                if skip.size:
                    for j in range(w):
                        acc[j] = skips[j] * ut[j]
                for n in range(n_state):
                    bn, cn = b[t * b_row + n], c[t * c_row + n]
                    for j in range(w):
                        new = exp(dt[j] * rates[n, j]) * h[n, j] + x[j] * bn
                        h[n, j] = new
                        acc[j] += new * cn
                yt = y[t, left:right]
                if z.size:
                    at = t * z_row + left
                    zt = z[at : at + w]
                    for j in range(w):
                        yt[j] = acc[j] * (zt[j] * _sigmoid(zt[j]))
                else:
                    for j in range(w):
                        yt[j] = acc[j]
            state[s, :, left:right] = h


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
            right = min(left + width, hi)
            w = right - left
            rates, skips, biases = a[:, left:right].copy(), skip[left:right], bias[left:right]
            h = np.empty((chunk + 1, n_state, w), np.float32)
            decay = np.empty((chunk, n_state, w), np.float32)
            dt = np.empty((chunk, w), np.float32)
            x = np.empty((chunk, w), np.float32)
            acc = np.empty((chunk, w), np.float32)
            g, into, rate = np.empty(w, np.float32), np.empty(w, np.float32), np.empty(w, np.float32)
            gh = dstate[s, :, left:right].copy()
            sum_a, sum_skip = np.zeros((n_state, w), np.float64), np.zeros(w, np.float64)
            sum_bias = np.zeros(w, np.float64)
            for k in range((length - 1) // chunk, -1, -1):
                begin, steps = k * chunk, min(chunk, length - k * chunk)
                h[0] = kept[start // chunk + s + k, :, left:right]
                for i in range(steps):
                    t = start + (length - 1 - begin - i if reverse else begin + i)
                    at = t * delta_row + left
                    dti, xi, acci = dt[i], x[i], acc[i]
                    _step_sizes(delta[at : at + w], biases, softplus, dti)
                    at = t * u_row + left
                    ut = u[at : at + w]
                    for j in range(w):
                        xi[j] = dti[j] * ut[j]
                        acci[j] = _ZERO
                    for n in range(n_state):
                        bn, cn = b[t * b_row + n], c[t * c_row + n]
                        before, after, keeps, an = h[i, n], h[i + 1, n], decay[i, n], rates[n]
                        for j in range(w):
                            keep = exp(dti[j] * an[j])
                            new = keep * before[j] + xi[j] * bn
                            keeps[j] = keep
                            after[j] = new
                            acci[j] += new * cn
                for i in range(steps - 1, -1, -1):
                    t = start + (length - 1 - begin - i if reverse else begin + i)
                    at = t * u_row + left
                    ut, dyt, dut = u[at : at + w], dy[t, left:right], du[t, left:right]
                    dti, xi, acci = dt[i], x[i], acc[i]
                    for j in range(w):
                        g[j] = dyt[j]
                        into[j] = _ZERO
                        rate[j] = _ZERO
                    if skip.size:
                        for j in range(w):
                            acci[j] += skips[j] * ut[j]
                    if z.size:
                        at = t * z_row + left
                        zt, dzt = z[at : at + w], dz[t, left:right]
                        for j in range(w):
                            share = _sigmoid(zt[j])
                            silu = zt[j] * share
                            dzt[j] = g[j] * acci[j] * (share + silu * (_ONE - share))
                            g[j] *= silu
                    for n in range(n_state):
                        bn, cn = b[t * b_row + n], c[t * c_row + n]
                        before, after, keeps, an = h[i, n], h[i + 1, n], decay[i, n], rates[n]
                        ghn, sum_n = gh[n], sum_a[n]
                        to_b, to_c = _ZERO, _ZERO
                        for j in range(w):
                            grad = ghn[j] + g[j] * cn
                            to_c += g[j] * after[j]
                            to_b += grad * xi[j]
                            into[j] += grad * bn
                            grad *= keeps[j]
                            ghn[j] = grad
                            grad *= before[j]
                            rate[j] += grad * an[j]
                            sum_n[j] += np.float64(grad * dti[j])
                        db[t, n] += to_b
                        dc[t, n] += to_c
                    for j in range(w):
                        dut[j] = into[j] * dti[j]
                        rate[j] += into[j] * ut[j]
                    if skip.size:
                        for j in range(w):
                            dut[j] += g[j] * skips[j]
                            sum_skip[j] += np.float64(g[j] * ut[j])
                    if softplus:
                        at = t * delta_row + left
                        raw = delta[at : at + w]
                        if bias.size:
                            for j in range(w):
                                rate[j] *= _sigmoid(raw[j] + biases[j])
                        else:
                            for j in range(w):
                                rate[j] *= _sigmoid(raw[j])
                    ddelta[t, left:right] = rate
                    if bias.size:
                        for j in range(w):
                            sum_bias[j] += np.float64(rate[j])
            da[:, left:right] += sum_a
            if skip.size:
                dskip[left:right] += sum_skip
            if bias.size:
                dbias[left:right] += sum_bias
            dstate[s, :, left:right] = gh
