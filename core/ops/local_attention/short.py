"""Short sequences on the CPU: several at a time, the band a matrix that hides the rest.

What blocks save in products is little there, and the calls for each sequence cost more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 256  # of a sequence, at most
CELLS = 1 << 20  # scores held at once: 4 MB


def takes(tokens: int, window: int) -> bool:
    """Whether sequences are short: at most a few times what a token sees."""
    return tokens <= min(TOKENS, max(128, 5 * window))


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, mask: Tensor | None, window: int, scale: float
) -> Tensor:
    """Return the output `[B, N, H, D]`; rows of global and of masked tokens mean nothing."""
    out = torch.empty(q.shape, dtype=q.dtype)
    for part in _parts(q):
        query, key, value = (_heads(x[part]) for x in (q, k, v))
        shown = _shown(len(query), q.shape[1], index, mask, part, window)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=scale)
        out[part] = found.transpose(1, 2)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    silent: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `silent [B, N]` are the rows that have none."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for part in _parts(q):
        query, key, value, do = (_heads(x[part]) for x in (q, k, v, grad))
        shown = _shown(len(query), q.shape[1], index, mask, part, window)
        scores = (query @ key.transpose(2, 3)).mul_(scale)
        weights = torch.softmax(scores.masked_fill_(~shown, -math.inf), -1)
        if silent is not None:
            weights.masked_fill_(silent[part, None, :, None], 0.0)
        dw = (do @ value.transpose(2, 3)).mul_(weights)
        ds = dw.addcmul_(weights, dw.sum(-1, keepdim=True), value=-1).mul_(scale)
        for target, found in (
            (dq, ds @ key),
            (dk, ds.transpose(2, 3) @ query),
            (dv, weights.transpose(2, 3) @ do),
        ):
            target[part] = found.transpose(1, 2)
    return dq, dk, dv


def _parts(q: Tensor) -> Iterator[slice]:
    """Cut the batch."""
    batch, tokens, heads, _ = q.shape
    size = max(1, CELLS // max(1, heads * tokens * tokens))
    yield from (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def _heads(x: Tensor) -> Tensor:
    """`[B, N, H, D]` as `[B, H, N, D]`; half precision is computed in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).contiguous()


def _shown(
    batch: int, tokens: int, index: Tensor | None, mask: Tensor | None, part: slice, window: int
) -> Tensor:
    """Which keys each row sees, `[B or 1, 1, N, N]`."""
    place = torch.arange(tokens)
    shown = ((place[:, None] - place).abs() <= window)[None]
    if index is not None:
        own = index[part]
        far = torch.zeros(batch, tokens, dtype=torch.bool)
        which, group = (own >= 0).nonzero(as_tuple=True)
        far[which, own[which, group]] = True
        shown = shown | far[:, None]
    if mask is not None:
        shown = shown & mask[part, None]
    return shown[:, None]
