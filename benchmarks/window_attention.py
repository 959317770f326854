"""Window attention against timm's default path of Swin, at the sizes of Swin-T's first stage, batch 8.

Both begin with the projections' output and end before the projection back. timm's path is its block's own
steps: roll and partition, the unfused softmax with bias and mask, reverse and roll back. As in timm, what is
rolled and partitioned is the projection's input of 96 channels; ours reads q, k and v where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import timm
import torch
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor

from benchmarks.measure import Case, difference, inference, training
from manyheads.core.ops import window_attention

BATCH, SIZE, HEADS, DIM, WINDOW = 8, 56, 3, 32, 7


def ours(qkv: Tensor, table: Tensor, shift: int, index: Tensor) -> Tensor:
    """From qkv `[B, H, W, 3, heads, D]` to `[B, H, W, heads * D]`."""
    q, k, v = qkv.unbind(3)
    return window_attention(q, k, v, WINDOW, shift=shift, bias=bias_of(table, index)).flatten(3)


def timms(x: Tensor, qkv: Tensor, table: Tensor, shift: int, index: Tensor, mask: Tensor | None) -> Tensor:
    """The same from x `[B, H, W, C]` and its projection in windows, `[B * windows, n, 3 * C]`."""
    rolled = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    window_partition(rolled, (WINDOW, WINDOW))  # what the projection to qkv reads
    n = WINDOW * WINDOW
    q, k, v = qkv.reshape(len(qkv), n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    attn = q * DIM**-0.5 @ k.transpose(-2, -1) + bias_of(table, index).unsqueeze(0)
    if mask is not None:
        attn = attn.view(-1, len(mask), HEADS, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, HEADS, n, n)
    out = (attn.softmax(-1) @ v).transpose(1, 2).reshape(-1, WINDOW, WINDOW, HEADS * DIM)
    out = window_reverse(out, (WINDOW, WINDOW), SIZE, SIZE)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """timm's lookup of the table of relative positions, for both: `[heads, n, n]`."""
    return table[index.flatten()].view(*index.shape, HEADS).permute(2, 0, 1).contiguous()


def cases(device: str) -> Iterator[Case]:
    """Shifted windows, with targets, and plain ones."""
    index = get_relative_position_index(WINDOW, WINDOW).to(device)
    x = torch.randn(BATCH, SIZE, SIZE, HEADS * DIM, device=device)
    qkv = torch.randn(BATCH, SIZE, SIZE, 3, HEADS, DIM, device=device)
    table = torch.randn((2 * WINDOW - 1) ** 2, HEADS, device=device)
    for shift in (3, 0):
        block = SwinTransformerBlock(
            HEADS * DIM, (SIZE, SIZE), HEADS, window_size=WINDOW, shift_size=shift
        ).to(device)
        partitioned = window_partition(torch.roll(qkv, (-shift, -shift), (1, 2)).flatten(3), (WINDOW, WINDOW))
        windows = partitioned.flatten(1, 2)  # [B * windows, n, 3 * C]
        one = partial(ours, shift=shift, index=index)
        two = partial(timms, x, shift=shift, index=index, mask=block.attn_mask)
        kind = "shifted" if shift else "plain"
        shape = f"B{BATCH} {SIZE}x{SIZE} window {WINDOW} {HEADS}x{DIM} {kind}"
        peer = f"timm {timm.__version__} default"
        steps = inference(one, qkv, table), inference(two, windows, table)
        yield Case(
            "window_attention forward", shape, peer, *steps,
            target=2.3 if shift else None, difference=difference(*steps),
        )  # fmt: skip
        yield Case(
            "window_attention forward+backward", shape, peer,
            training(one, qkv, table), training(two, windows, table),
            target=1.3 if shift else None,
            difference=partial(gradients_differ, one, two, qkv, windows, table, shift),
        )  # fmt: skip


def gradients_differ(one, two, qkv: Tensor, windows: Tensor, table: Tensor, shift: int) -> float:  # type: ignore[no-untyped-def]
    """The largest difference of the gradients of qkv and table, each relative to its largest value."""
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, windows, table, table)]
    cotangent = torch.randn(*qkv.shape[:3], HEADS * DIM, device=qkv.device)
    mine = torch.autograd.grad(one(leaves[0], leaves[2]), (leaves[0], leaves[2]), cotangent)
    theirs = torch.autograd.grad(two(leaves[1], leaves[3]), (leaves[1], leaves[3]), cotangent)
    rolled = torch.roll(mine[0], (-shift, -shift), (1, 2)).flatten(3)
    mine = window_partition(rolled, (WINDOW, WINDOW)).flatten(1, 2), mine[1]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, theirs, strict=True))
