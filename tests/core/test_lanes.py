"""Operations on eight numbers against numpy's on each."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from manyheads.core.jit import kernel
from manyheads.core.lanes import COUNT, absolute, any_of, choose, empty, equal, load, spread, sqrt, store


@kernel
def everything(x, y, out):
    a, b = load(x, 1), load(y, 0)
    store(out, 0, a + b)
    store(out, 1, a - b)
    store(out, 2, a * b)
    store(out, 3, a / b)
    store(out, 4, sqrt(absolute(a)))
    store(out, 5, 2.0 * a - 1.0)
    store(out, 6, 1.0 / b + 0.5)
    store(out, 7, choose(a > b, a, b))
    store(out, 8, choose((a < 0.5) & (a > 0.0), spread(1.0), b))
    store(out, 9, choose(equal(b, spread(2.0)), spread(-1.0), a))
    out[10, 0] = 1.0 if any_of(a > 100.0) else 0.0
    out[10, 1] = 1.0 if any_of(equal(a, load(x, 1))) else 0.0
    return empty(5)


@pytest.mark.parametrize("seed", range(4))
def test_operations(seed):
    draw = np.random.default_rng(seed)
    x, y, out = draw.standard_normal((3, COUNT)), draw.standard_normal((2, COUNT)), np.zeros((11, COUNT))
    y[0, seed] = 2.0
    scratch = everything(x, y, out)
    a, b = x[1], y[0]
    wanted = [a + b, a - b, a * b, a / b, np.sqrt(abs(a)), 2 * a - 1, 1 / b + 0.5, np.maximum(a, b)]
    wanted += [np.where((a < 0.5) & (a > 0), 1.0, b), np.where(b == 2.0, -1.0, a)]
    np.testing.assert_allclose(out[:10], wanted, rtol=1e-15, atol=1e-15)
    assert out[10, :2].tolist() == [0.0, 1.0]
    assert scratch.shape == (5, COUNT)
    assert scratch.ctypes.data % 64 == 0


@kernel
def running_sum(x, out):
    total = spread(0.0)
    for i in range(x.shape[0]):
        total = total + load(x, i) * load(x, i)
    store(out, 0, total)


def test_a_lane_does_not_depend_on_its_place():
    numbers = np.random.default_rng(0).standard_normal(1001)
    x, out = np.zeros((1001, COUNT)), np.zeros((1, COUNT))
    for lane in range(COUNT):
        x[:] = np.random.default_rng(lane + 1).standard_normal(x.shape)
        x[:, lane] = numbers
        running_sum(x, out)
        if lane == 0:
            first = out[0, 0]
        assert out[0, lane] == first


@kernel
def in_float32(x, out):
    a = load(x, 0)
    store(out, 0, choose(a > 0.0, 2.0 * sqrt(absolute(a)), spread(np.float32(-1.0))))
    store(out, 1, a * spread(x[1, 3]) - 0.5)


def test_sixteen_of_float32():
    x, out = (
        np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32),
        np.zeros((2, 16), np.float32),
    )
    in_float32(x, out)
    a = x[0, :16]
    wanted = np.stack([np.where(a > 0, 2 * np.sqrt(abs(a)), -1), a * x[1, 3] - np.float32(0.5)])
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
