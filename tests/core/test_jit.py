"""The exponential that the compiled loops share, and the loops' cache."""

from __future__ import annotations

import numpy as np
import pytest

jit = pytest.importorskip("manyheads.core.jit")


@jit.kernel
def _exponentials(x, out):
    for i in range(x.size):
        out[i] = jit.exp(x[i])


def exponentials(x):
    out = np.full_like(x, np.nan)
    _exponentials(x, out)
    return out


def test_exp_is_near_float64():
    x = np.linspace(-87.3, 88.3, 200_001).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(exponentials(x) / truth - 1).max() < 1.2e-7
    assert exponentials(np.zeros(1, np.float32)) == 1


def test_exp_at_the_ends():
    x = np.array([np.nan, np.inf, -np.inf, 89, -88, 88.37, -87.33], np.float32)
    got = exponentials(x)
    assert np.isnan(got[0])
    assert got[1] == np.inf
    assert (got[[2, 4]] == 0).all()
    assert got[3] == np.inf
    assert np.isfinite(got[5:]).all()
    assert (got[5:] > 0).all()


def test_a_loop_over_exp_becomes_vectors():
    fresh = jit.numba.njit(**jit._OPTIONS)(_exponentials.py_func)  # one from the cache shows no code
    fresh(np.zeros(4, np.float32), np.zeros(4, np.float32))
    assert "x float>" in next(iter(fresh.inspect_llvm().values()))


def test_without_a_place_for_the_cache(monkeypatch):
    real = jit.numba.njit

    def njit(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(jit.numba, "njit", njit)

    @jit.kernel
    def twice(x):
        return x * 2

    assert twice(3) == 6
