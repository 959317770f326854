"""Flow attention against the plain formula of its paper's code, and with all weights at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import flow_attention
from manyheads.core.ops.flow_attention import reference

VERSION = f"torch {torch.__version__}"
EPS = 1e-6


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flow_attention(q, k, v, causal=True)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The steps of the paper, one by one, eps added to whole tensors."""
    q, k = q.sigmoid(), k.sigmoid()
    incoming = ((q + EPS) * (k.sum(1, keepdim=True) + EPS)).sum(-1, keepdim=True)
    outgoing = ((k + EPS) * (q.sum(1, keepdim=True) + EPS)).sum(-1, keepdim=True)
    sink = ((q + EPS) * ((k / outgoing).sum(1, keepdim=True) + EPS)).sum(-1, keepdim=True)
    source = ((k + EPS) * ((q / incoming).sum(1, keepdim=True) + EPS)).sum(-1, keepdim=True)
    competition = source.clamp(-1, 1).softmax(1) * k.shape[1]
    allocation = (sink * (q.shape[1] / k.shape[1])).sigmoid()
    states = torch.einsum("bshk,bshv->bhkv", k, v * competition)
    return torch.einsum("blhk,bhkv->blhv", q / incoming, states) * allocation


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The causal steps, one by one; the last with the state of every step at once."""
    q, k = q.sigmoid(), k.sigmoid()
    count = torch.arange(1, k.shape[1] + 1, device=k.device)[:, None, None].float()
    incoming = ((q + EPS) * (k.cumsum(1) + EPS)).sum(-1, keepdim=True)
    outgoing = ((k + EPS) * (q.cumsum(1) + EPS)).sum(-1, keepdim=True)
    sink = ((q + EPS) * ((k * count / outgoing).cumsum(1) + EPS)).sum(-1, keepdim=True) / count
    source = ((k + EPS) * ((q * count / incoming).cumsum(1) + EPS)).sum(-1, keepdim=True) / count
    strength = source.clamp(-1, 1).exp()
    competition = strength / strength.cumsum(1) * count
    states = (k[..., :, None] * (v * competition)[..., None, :]).cumsum(1)  # [B, L, H, K, V]
    return ((q / incoming)[..., None, :] @ states)[..., 0, :] * sink.sigmoid()


def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.flow_attention(q, k, v)


def cases(device: str) -> Iterator[Case]:
    shape = "B1 L1024 H6x64"
    given = [torch.randn(1, 1024, 6, 64, device=device) for _ in range(3)]
    pairs = (
        ("", flow_attention, "plain formula", formula),
        ("", flow_attention, "all weights", weights),
        ("causal ", causal, "running sums", running),
    )
    for kind, op, name, peer in pairs:
        ours, theirs = inference(op, *given), inference(peer, *given)
        same = difference(ours, theirs)
        yield Case(f"flow_attention {kind}forward", shape, f"{name}, {VERSION}", ours, theirs, None, same)
        ours, theirs = training(op, *given), training(peer, *given)
        yield Case(f"flow_attention {kind}forward+backward", shape, f"{name}, {VERSION}", ours, theirs)
