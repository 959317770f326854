"""Dropout: the mask's statistics, gradients and seed."""

import pytest
import torch

from manyheads.core.ops.dropout import dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_drops_the_asked_fraction_and_keeps_the_mean(p):
    torch.manual_seed(0)
    n = 1_000_001  # not a multiple of four
    y = dropout(torch.ones(n), p)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    assert abs(y.double().mean() - 1) < 5 * (p / (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000), 0.5) != 0).float() - 0.5
    for lag in (1, 2, 3, 4, 5, 8):
        assert abs((kept[lag:] * kept[:-lag]).mean() * 4) < 5 / 400_000**0.5


def test_gradient_passes_where_the_value_did():
    x = torch.randn(7, 5, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)
    assert 0 < (y == 0).sum() < 35


def test_the_seed_decides():
    x = torch.ones(1000)
    torch.manual_seed(4)
    first, second = dropout(x, 0.2), dropout(x, 0.2)
    torch.manual_seed(4)
    assert torch.equal(first, dropout(x, 0.2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    assert dropout(torch.ones(3, 5, dtype=dtype), 0.5).dtype == dtype


def test_edges():
    x = torch.randn(10)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 1.0).abs().sum() == 0
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match="must be in"):
        dropout(x, 1.5)
