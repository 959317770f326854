"""The gated attention unit against the published composition: filled-up groups, one product for each part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import gated_attention_unit

GROUP = 256


def peer(quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, hidden: Tensor) -> Tensor:
    """As published, from the two values in one tensor on: fill up, group, attend, undo, gate."""
    v, u = hidden.chunk(2, -1)
    frames = v.shape[1]
    fill = -frames % GROUP
    given = (F.pad(x, (0, 0, 0, fill)) for x in (quad_q, quad_k, lin_q, lin_k, v, u))
    qq, qk, lq, lk, gv, gu = (x.unflatten(1, (-1, GROUP)) for x in given)
    weights = F.relu(torch.einsum("...id,...jd->...ij", qq, qk) / GROUP) ** 2
    out = [torch.einsum("...ij,...jd->...id", weights, x) for x in (gv, gu)]
    sums = [torch.einsum("bgnd,bgne->bde", lk, x) / frames for x in (gv, gu)]
    linear = [torch.einsum("bgnd,bde->bgne", lq, x) for x in sums]
    att_v, att_u = ((a + b).flatten(1, 2)[:, :frames] for a, b in zip(out, linear, strict=True))
    return (att_u * v) * torch.sigmoid(att_v * u)


def ours(quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, hidden: Tensor) -> Tensor:
    """The op, on the same two halves as one tensor."""
    return gated_attention_unit(quad_q, quad_k, lin_q, lin_k, hidden, group_size=GROUP)


def cases(device: str) -> Iterator[Case]:
    """Yield the issue's lines: N 512 (v and u of 1,024 channels, queries and keys of 128), 4,000 frames."""
    small = [torch.randn(1, 4000, 128, device=device) for _ in range(4)]
    hidden = torch.randn(1, 4000, 2048, device=device)
    for name, make in (("forward", inference), ("forward+backward", training)):
        a, b = make(ours, *small, hidden), make(peer, *small, hidden)
        yield Case(
            name=f"gated_attention_unit {name}",
            shape="B1 N512 S4000 qk128 group256",
            peer=f"plain composition, torch {torch.__version__}",
            ours=a,
            theirs=b,
            target=1.5,
            difference=difference(a, b),
        )
