"""Mlp and GatedMlp against their formulas, and the names of their activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.mlp import ACTIVATIONS, GATES, GatedMlp, Mlp


def test_mlp_is_two_linears():
    torch.manual_seed(0)
    layer = Mlp(12, 20, out_dim=5, activation="relu")
    theirs = nn.Sequential(layer.fc1, nn.ReLU(), layer.fc2)
    x = torch.randn(3, 4, 12)
    assert layer(x).shape == (3, 4, 5)
    torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=0)
    assert sum(p.numel() for p in layer.parameters()) == 12 * 20 + 20 + 20 * 5 + 5


@pytest.mark.parametrize(
    ("gate", "formula"),
    [
        ("glu", torch.sigmoid),
        ("swiglu", lambda x: x * torch.sigmoid(x)),
        ("geglu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("geglu_tanh", nn.GELU(approximate="tanh")),
        ("reglu", lambda x: x.clamp(min=0)),
        ("bilinear", lambda x: x),
    ],
)
def test_gated_mlp(gate, formula):
    torch.manual_seed(0)
    layer = GatedMlp(12, 8, gate=gate, bias=False)
    x = torch.randn(3, 12)
    first, second = x @ layer.fc1.weight[:8].T, x @ layer.fc1.weight[8:].T
    torch.testing.assert_close(layer(x), (formula(first) * second) @ layer.fc2.weight.T)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 12 * 8


def test_swiglu_is_glu_with_silu():
    """torch's own GLU gates with the second half; ours with the first."""
    torch.manual_seed(0)
    layer = GatedMlp(6, 5, gate="glu")
    x = torch.randn(2, 6)
    hidden = layer.fc1(x)
    swapped = torch.cat([hidden[:, 5:], hidden[:, :5]], dim=-1)
    torch.testing.assert_close(layer(x), layer.fc2(F.glu(swapped)))


def test_every_name_runs_and_a_wrong_one_is_refused():
    x = torch.randn(2, 6)
    for name in ACTIVATIONS:
        assert Mlp(6, 7, activation=name)(x).shape == (2, 6)
    for name in GATES:
        assert GatedMlp(6, 7, gate=name)(x).shape == (2, 6)
    torch.testing.assert_close(
        ACTIVATIONS["squared_relu"](torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0])
    )
    with pytest.raises(UsageError, match="no activation 'geluu'; did you mean 'gelu'"):
        Mlp(6, 7, activation="geluu")
    with pytest.raises(UsageError, match="no gate 'swish'"):
        GatedMlp(6, 7, gate="swish")


def test_dropout_only_in_training():
    torch.manual_seed(0)
    layer, x = Mlp(6, 64, dropout=0.5), torch.randn(2, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
