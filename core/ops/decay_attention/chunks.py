"""How the CPU path lays tokens out in chunks, and the scan that carries states from chunk to chunk.

Every sequence is cut into chunks of `size` tokens; its last one is filled up with zeros, which leave a state
as it is (no key, and a log-decay of zero). Chunks of all sequences lie one after the other, `[N, size, ...]`.
A reversed sequence is laid out last token first, and the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core import parallel

# Elements of the largest temporary of one part, and of a thread's share of a block: with its few companions
# it stays in a core's own cache.
_PART, _SHARE = 1 << 16, 1 << 17

Index = slice | Tensor


@dataclass(frozen=True)
class Layout:
    """Chunks of a batch.

    Attributes:
        size: Tokens of a chunk.
        chunks: How many chunks there are, N.
        sequences: How many sequences there are: the batch, or the packed ones.
        steps: Chunks that stand at the same place of their sequences, and those sequences, first place first.
        shape: (B, L) of the tokens.
        slots: Where each packed token lies in the chunks; None where sequences have one length.
        reverse: Whether tokens lie in reverse.
    """

    size: int
    chunks: int
    sequences: int
    steps: Sequence[tuple[Index, Index]]
    shape: tuple[int, int]
    slots: Tensor | None = None
    reverse: bool = False

    def split(self, x: Tensor) -> Tensor:
        """Lay tokens `[B, L, ...]` out in chunks, float32 `[N, size, ...]`, contiguous."""
        rest = x.shape[2:]
        if self.slots is not None:
            out = torch.zeros(self.chunks * self.size, *rest)
            out[self.slots] = x[0].float()
            return out.view(self.chunks, self.size, *rest)
        x = x.flip(1) if self.reverse else x
        missing = -x.shape[1] % self.size
        if missing:
            x = F.pad(x, (0, 0) * len(rest) + (0, missing))
        return x.float().contiguous().view(self.chunks, self.size, *rest)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Put chunks back in line: `[N, size, ...]` to `[B, L, ...]`."""
        rest = x.shape[2:]
        if self.slots is not None:
            return x.flatten(0, 1)[self.slots].to(dtype)[None]
        batch, length = self.shape
        x = x.reshape(batch, -1, *rest)[:, :length]
        return (x.flip(1) if self.reverse else x).to(dtype).contiguous()


def layout(batch: int, length: int, cu_seqlens: Tensor | None, size: int, reverse: bool) -> Layout:
    """Cut a batch of equal sequences, or the packed ones that cu_seqlens bounds, into chunks."""
    if cu_seqlens is None:
        size = min(size, max(16, 1 << (length - 1).bit_length()))
        each = -(-length // size)
        steps = [(slice(t, None, each), slice(None)) for t in range(each)]
        return Layout(size, batch * each, batch, steps, (batch, length), reverse=reverse)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    counts = (lengths + size - 1) // size
    first = counts.cumsum(0) - counts  # [S], each sequence's first chunk
    if reverse:
        slots = torch.repeat_interleave(first * size + bounds[1:] - 1, lengths) - torch.arange(length)
    else:
        slots = torch.repeat_interleave(first * size - bounds[:-1], lengths) + torch.arange(length)
    most = int(counts.max()) if counts.numel() else 0
    rows = [(counts > t).nonzero()[:, 0] for t in range(most)]
    packed = [(first[found] + t, found) for t, found in enumerate(rows)]
    return Layout(size, int(counts.sum()), len(counts), packed, (batch, length), slots, reverse)


def most_chunks(length: int, sequences: int, size: int) -> int:
    """The most chunks that sequences of so many tokens together may take."""
    return length // size + sequences


def scan(states: Tensor, decay: Tensor | None, state: Tensor, steps: Iterable[tuple[Index, Index]]) -> Tensor:
    """Carry states along the chunks; what each chunk adds gives way to the state that it meets.

    Args:
        states: What each chunk adds; afterwards the state before each chunk.
        decay: What a state is multiplied with on its way through a chunk; None for one.
        state: Before the first step.
        steps: The layout's, in the order to go.

    Shape:
        states `[G, N, K, h, V]`; decay `[G, N, 1 or K, h, 1]`; state and the result `[G, S, K, h, V]`.

    Returns:
        The state after the last step of each sequence.
    """
    last = state.clone()
    for chunks, rows in steps:
        before, added = last[:, rows], states[:, chunks]
        after = before + added if decay is None else torch.addcmul(added, before, decay[:, chunks])
        states[:, chunks] = before
        last[:, rows] = after
    return last


def blocks(groups: int, chunks: int, weight: int) -> list[tuple[int, slice]]:
    """Groups, and ranges of their chunks, for one block after the other with torch's threads inside each.

    Args:
        weight: Elements of a chunk's largest temporary.
    """
    return _cut(groups, chunks, _SHARE * torch.get_num_threads() // weight)


def each_part(groups: int, chunks: int, weight: int, work: Callable[[int, slice], None]) -> None:
    """Run `work(group, chunks)` for all groups and ranges of chunks, parts side by side.

    Args:
        weight: Elements of a chunk's largest temporary.
    """
    parts = _cut(groups, chunks, _PART // weight)
    if groups * chunks * weight <= _PART:  # not worth a hand-over
        for group, found in parts:
            work(group, found)
        return
    parallel.run([partial(work, *part) for part in parts])


def _cut(groups: int, chunks: int, count: int) -> list[tuple[int, slice]]:
    count = max(1, count)
    return [(g, slice(i, min(i + count, chunks))) for g in range(groups) for i in range(0, chunks, count)]
