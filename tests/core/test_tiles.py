"""Products of blocks of rows, of every remainder of rows and columns."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from manyheads.core.tiles import add_outer, add_product


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 64])
@pytest.mark.parametrize(("inner", "columns"), [(16, 16), (5, 48), (64, 64), (80, 80), (128, 144)])
def test_products(rows, inner, columns):
    rng = np.random.default_rng(rows)
    a = rng.normal(size=(rows + 5, inner)).astype(np.float32)
    weight = rng.normal(size=(inner, columns)).astype(np.float32)
    out = rng.normal(size=(rows + 9, columns)).astype(np.float32)
    wanted = out.astype(np.float64)
    wanted[4 : 4 + rows] += a[2 : 2 + rows].astype(np.float64) @ weight
    add_product(a, 2, weight, out, 4, rows)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=inner * 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize(("inner", "columns"), [(16, 16), (64, 64), (80, 48), (128, 144)])
def test_outer_products(rows, inner, columns):
    rng = np.random.default_rng(rows)
    a = rng.normal(size=(rows + 5, inner)).astype(np.float32)
    b = rng.normal(size=(rows + 5, columns)).astype(np.float32)
    out = rng.normal(size=(inner, columns)).astype(np.float32)
    wanted = out.astype(np.float64)
    wanted[:16] += (a[2 : 2 + rows].astype(np.float64).T @ b[3 : 3 + rows])[:16]
    add_outer(a, 2, b, 3, out, rows, 0, 16)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4)


def test_a_row_does_not_depend_on_its_block():
    rng = np.random.default_rng(0)
    a, weight = rng.normal(size=(9, 64)).astype(np.float32), rng.normal(size=(64, 80)).astype(np.float32)
    whole, single = np.zeros((9, 80), np.float32), np.zeros((9, 80), np.float32)
    add_product(a, 0, weight, whole, 0, 9)
    for row in range(9):
        add_product(a, row, weight, single, row, 1)
    assert np.array_equal(whole, single)
