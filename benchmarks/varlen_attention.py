"""Packed attention against padded SDPA with a mask: 64 sequences, lengths uniform in 1..512.

The peer gets its tensors padded and its mask made: only the attention is timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Step, difference, inference, training
from manyheads.core.ops import varlen_attention

SEQUENCES, LONGEST, HEADS, DIM, FAR = 64, 512, 8, 64, 32


def cases(device: str) -> Iterator[Case]:
    """Forward, forward+backward, and both with a learned bias by relative position."""
    draw = random.Random(0)
    lengths = torch.tensor([draw.randint(1, LONGEST) for _ in range(SEQUENCES)])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    inside = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)  # [B, N]
    packed = [torch.randn(int(lengths.sum()), HEADS, DIM, device=device) for _ in range(3)]
    table = torch.randn(HEADS, 2 * FAR + 1, device=device)
    padded = [pad(x, inside) for x in packed]
    mask = inside[:, None, None]  # [B, 1, 1, N]
    step = torch.arange(inside.shape[1], device=device)
    column = (step - step[:, None]).clamp(-FAR, FAR) + FAR  # [N, N]

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return varlen_attention(q, k, v, cu, bias=bias)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def theirs_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        added = bias[:, column].masked_fill(~mask, float("-inf"))  # [B, H, N, N]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    cotangent = torch.randn_like(packed[0])
    shape = f"64 of 1..{LONGEST}, {int(lengths.sum())} tokens, 8x64"
    peer = f"torch {torch.__version__} padded SDPA, mask"
    biased = f"torch {torch.__version__} padded SDPA, bias[column]"
    passes = [("forward", 2.2, None, None), ("forward+backward", 1.8, cotangent, pad(cotangent, inside))]
    for name, target, packed_grad, padded_grad in passes:
        one, other = step_of(ours, packed_grad, *packed), step_of(theirs, padded_grad, *padded)
        same = difference(one, unpadded(other, inside))
        yield Case(f"varlen_attention {name}", shape, peer, one, other, target, same)
        one, other = (
            step_of(ours, packed_grad, *packed, table),
            step_of(theirs_biased, padded_grad, *padded, table),
        )
        same = difference(one, unpadded(other, inside))
        yield Case(f"varlen_attention bias {name}", shape, biased, one, other, None, same)


def pad(x: Tensor, inside: Tensor) -> Tensor:
    """Spread packed `[T, H, D]` to `[B, H, N, D]`."""
    out = x.new_zeros(*inside.shape, *x.shape[1:])
    out[inside] = x
    return out.transpose(1, 2)


def step_of(function: Callable[..., Tensor], cotangent: Tensor | None, *inputs: Tensor) -> Step:
    """A forward pass, or with a cotangent forward and backward; that of padding is zero."""
    if cotangent is None:
        return inference(function, *inputs)
    return training(function, *inputs, cotangent=cotangent)


def unpadded(step: Step, inside: Tensor) -> Step:
    """A step whose padded tensors come out packed."""

    def run() -> object:
        found = step()
        tensors = (found,) if isinstance(found, Tensor) else found
        return [x.transpose(1, 2)[inside] if x.dim() == 4 else x for x in tensors]  # type: ignore[union-attr, attr-defined]

    return run
