"""The gates' loops; rows hold v, then u, and att(v), then att(u)."""

from __future__ import annotations

import numpy as np

from manyheads.core.jit import exp, inline, kernel

ONE = np.float32(1.0)


@inline
def sigmoid(x: np.float32) -> np.float32:
    """1 / (1 + exp(-x))."""
    return ONE / (ONE + exp(-x))


@kernel
def gates(attended: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """Write att(u) * v * sigmoid(att(v) * u); `[n, 2 E]` twice, `[n, E]`."""
    dim = out.shape[1]
    for i in range(out.shape[0]):
        att_v, att_u = attended[i, :dim], attended[i, dim:]
        v, u, y = values[i, :dim], values[i, dim:], out[i]
        for j in range(dim):
            y[j] = sigmoid(att_v[j] * u[j]) * att_u[j] * v[j]


@kernel
def pull_gates(
    dy: np.ndarray, values: np.ndarray, attended: np.ndarray, dx: np.ndarray, pull: np.ndarray
) -> None:
    """Write the gradients of the gates and of the attention; `[n, E]`, then `[n, 2 E]`."""
    dim = dy.shape[1]
    for i in range(dy.shape[0]):
        att_v, att_u = attended[i, :dim], attended[i, dim:]
        v, u, g = values[i, :dim], values[i, dim:], dy[i]
        dv, du = dx[i, :dim], dx[i, dim:]
        pull_v, pull_u = pull[i, :dim], pull[i, dim:]
        for j in range(dim):
            gate = sigmoid(att_v[j] * u[j])
            part = g[j] * gate
            pull_u[j] = part * v[j]
            dv[j] = part * att_u[j]
            back = part * att_u[j] * v[j] * (ONE - gate)  # through the sigmoid
            du[j] = back * att_v[j]
            pull_v[j] = back * u[j]
