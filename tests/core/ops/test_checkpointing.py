"""Ops under activation checkpointing: computed again in the backward pass, with the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from manyheads.core.ops import attention, depthwise_conv1d, local_attention, rms_norm, selective_scan


def _scan(u, delta, b, c):
    a = -torch.arange(1.0, 5.0).expand(u.shape[2], 4)
    return selective_scan(u, delta, a, b, c, delta_softplus=True, reverse=True)


def _bias(q, k, v, bias):
    return attention(q, k, v, bias=bias)


OPS = {
    "depthwise_conv1d": (
        lambda x, w, b: depthwise_conv1d(x, w, b, activation="silu"),
        (2, 9, 8),
        (8, 4),
        (8,),
    ),
    "selective_scan": (_scan, (2, 9, 8), (2, 9, 8), (2, 9, 4), (2, 9, 4)),
    "rms_norm": (lambda x, r, w: rms_norm(x, w, residual=r)[0], (2, 9, 8), (2, 9, 8), (8,)),
    "attention": (_bias, (2, 9, 2, 8), (2, 9, 2, 8), (2, 9, 2, 8), (2, 9, 9)),
    "local_attention": (
        lambda q, k, v: local_attention(q, k, v, 3, global_tokens=1),
        *((2, 19, 2, 8),) * 3,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_the_same(name):
    op, *shapes = OPS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y = op(*inputs)
    cotangent = torch.randn_like(y)
    want = torch.autograd.grad(y, inputs, cotangent)
    found = torch.autograd.grad(checkpoint(op, *inputs, use_reentrant=False), inputs, cotangent)
    for have, expected in zip(found, want, strict=True):
        assert torch.equal(have, expected)
