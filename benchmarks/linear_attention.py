"""Linear attention against its plain formulas in torch: step by step, running sums, all weights at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import linear_attention

VERSION = f"torch {torch.__version__}"


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, causal=True, feature_map="elu")


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, feature_map="elu")


def running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All states at once, as a running sum of the products of keys and values."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = (k[..., :, None] * v[..., None, :]).cumsum(1)  # [B, L, H, K, V]
    return (q[..., None, :] @ states)[..., 0, :] / (q * k.cumsum(1)).sum(-1, keepdim=True)


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All weights at once."""
    weights = torch.einsum("bihd,bjhd->bhij", F.elu(q) + 1, F.elu(k) + 1)
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All weights at once, those of later steps set to zero."""
    weights = torch.einsum("bihd,bjhd->bhij", F.elu(q) + 1, F.elu(k) + 1).tril()
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


def cases(device: str) -> Iterator[Case]:
    shape = "B1 L1024 H6x64"
    given = [torch.randn(1, 1024, 6, 64, device=device) for _ in range(3)]
    peers = {"running sums": running_sums, "masked weights": masked}
    for name, peer in peers.items():
        ours, theirs = inference(causal, *given), inference(peer, *given)
        yield Case(
            "linear_attention causal forward",
            shape,
            f"{name}, {VERSION}",
            ours,
            theirs,
            None,
            difference(ours, theirs),
        )
    ours, theirs = training(causal, *given), training(masked, *given)
    yield Case("linear_attention causal forward+backward", shape, f"masked weights, {VERSION}", ours, theirs)
    ours, theirs = inference(whole, *given), inference(quadratic, *given)
    yield Case(
        "linear_attention forward",
        shape,
        f"all weights, {VERSION}",
        ours,
        theirs,
        None,
        difference(ours, theirs),
    )
    ours, theirs = training(whole, *given), training(quadratic, *given)
    yield Case("linear_attention forward+backward", shape, f"all weights, {VERSION}", ours, theirs)
