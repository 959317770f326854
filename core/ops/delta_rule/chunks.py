"""How tokens lie in chunks: the first chunks of all sequences, then their second ones, and so on.

Longer sequences come first, so that the chunks of one place are a slice and go with the first few states.
The last chunk of a sequence is filled up with zeros, which leave a state as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Chunks of a batch of sequences.

    Attributes:
        size: Tokens of a chunk.
        chunks: How many there are, N.
        sequences: The batch, or the packed ones.
        places: Chunks at the same place of their sequences, first place first: (chunks, sequences), slices.
        order: The sequences, longest first; None where they are of one length.
        back: Each sequence's place in `order`.
        tokens: The row of the inputs `[B L, ...]` of each place in the chunks, one past the last for zeros.
        slots: The place in the chunks of each row of the inputs.
    """

    size: int
    chunks: int
    sequences: int
    places: Sequence[tuple[slice, slice]]
    order: Tensor | None
    back: Tensor | None
    tokens: Tensor
    slots: Tensor

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay tokens `[B, L, H, ...]` out in chunks, `[N, H, C, ...]`."""
        flat = x.flatten(0, 1).to(dtype)
        padded = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return padded[self.tokens].unflatten(0, (-1, self.size)).transpose(1, 2).contiguous()

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """Put chunks `[N, H, C, ...]` back in line, in the shape and dtype of `like`."""
        return x.transpose(1, 2).flatten(0, 1)[self.slots].to(like.dtype).reshape(like.shape)

    def sort(self, states: Tensor) -> Tensor:
        """States in the order of `places`."""
        return states if self.order is None else states[self.order]

    def unsort(self, states: Tensor) -> Tensor:
        """States in the order of the sequences."""
        return states if self.back is None else states[self.back]


def layout(batch: int, length: int, cu_seqlens: Tensor | None, size: int) -> Layout:
    """Cut a batch of equal sequences, or the packed ones that cu_seqlens bounds, into chunks of `size`."""
    if cu_seqlens is None:
        order = back = None
        lengths = torch.full((batch,), length)
        starts = torch.arange(batch) * length
    else:
        bounds = cu_seqlens.cpu().long()
        lengths, order = bounds.diff().sort(descending=True, stable=True)
        starts, back = bounds[:-1][order], order.argsort()
    counts = (lengths + size - 1) // size
    most = int(counts[0]) if counts.numel() else 0
    alive = (counts[None] > torch.arange(most)[:, None]).sum(1)  # sequences that have a chunk at each place
    firsts = [0, *alive.cumsum(0).tolist()]
    places = [(slice(a, b), slice(0, b - a)) for a, b in pairwise(firsts)]
    place = torch.repeat_interleave(torch.arange(most), alive)
    sequence = torch.arange(firsts[-1]) - torch.tensor(firsts, dtype=torch.int64)[place]
    step = (place * size)[:, None] + torch.arange(size)  # [N, C]
    rows = batch * length
    tokens = torch.where(step < lengths[sequence][:, None], starts[sequence][:, None] + step, rows).flatten()
    slots = torch.empty(rows + 1, dtype=torch.int64)
    slots[tokens] = torch.arange(tokens.numel())
    return Layout(size, firsts[-1], lengths.numel(), places, order, back, tokens, slots[:rows])
