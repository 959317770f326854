"""The norm modules: keys and values of torch's, and the residual form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.core.layers.norm import NORMS, CRMSNorm, LayerNorm, RMSNorm


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_state_dicts_are_torchs(ours, theirs):
    torch.manual_seed(0)
    source = theirs(48, eps=1e-5)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    target = ours(48, eps=1e-5)
    target.load_state_dict(source.state_dict(), strict=True)
    source.load_state_dict(target.state_dict(), strict=True)
    x = torch.randn(2, 7, 48) + 1
    torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(NORMS))
def test_residual_form(name):
    torch.manual_seed(0)
    norm = NORMS[name](48, weight=True, bias=True)
    nn.init.normal_(norm.weight)
    x, stream = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    y, z = norm(x, residual=stream)
    torch.testing.assert_close(z, x + stream, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(x + stream))


def test_parameters_and_repr():
    assert sum(p.numel() for p in LayerNorm(48).parameters()) == 96
    assert sum(p.numel() for p in RMSNorm(48).parameters()) == 48
    assert not list(CRMSNorm(47).parameters()) and not CRMSNorm(47).state_dict()
    assert repr(RMSNorm(48)) == "RMSNorm(48, eps=1e-06, weight=True, bias=False)"
    assert LayerNorm(8, weight=False, bias=False)(torch.randn(3, 8)).std(correction=0) < 1.01
