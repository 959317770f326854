"""What a model that guesses hidden items is asked: masks by the paper's recipe, drawn on the device.

Source: Sun et al. 2019, arXiv 1904.06690, and the code beside it (FeiSun/BERT4Rec).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.recsys.models.encoder import FIRST, Packed, starts_of


@dataclass(frozen=True)
class Recipe:
    """How windows are cut and masked.

    Args:
        max_len: Tokens of a window at most.
        rate: Which share of a window is masked.
        most: Masks of a window at most.
        step: Tokens from a window to the one before it.
        copies: Random masks of a window, for each one of its last item alone.
    """

    max_len: int
    rate: float
    most: int
    step: int
    copies: int = 10


RECIPES = {
    "ml_1m": Recipe(200, 0.2, 40, 100),
    "ml_20m": Recipe(200, 0.2, 20, 100),
    "beauty": Recipe(50, 0.6, 30, 5),
    "steam": Recipe(50, 0.4, 20, 25),
}


class Masked(NamedTuple):
    """A batch with hidden items.

    Args:
        batch: The histories, with [MASK] where an item is hidden.
        at: Where, in order.
        targets: The numbers of the items that are hidden there.

    Shape:
        at, targets `[M]`.
    """

    batch: Packed
    at: Tensor
    targets: Tensor


def mask_items(
    batch: Packed,
    mask_token: int,
    rate: float,
    most: int,
    last: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Masked:
    """Hide items: of each history so many as `rate` says, one at least, and every one by [MASK].

    Args:
        batch: Tokens of items.
        mask_token: What hides them.
        rate: Which share of a history is hidden, rounded; a half is rounded up.
        most: How many of a history at most.
        last: The histories of which the last item alone is hidden; None means none.
        generator: Of the draws, on the batch's device.

    Shape:
        last `[B]`, boolean.
    """
    tokens, starts = batch
    rows = batch.rows()
    counts = (batch.lengths * rate + 0.5).floor().clamp(1, most)
    # Sorted by row and then by chance, the first of each row are so many that none comes twice.
    chance = torch.rand(len(tokens), dtype=torch.float64, device=tokens.device, generator=generator)
    if last is not None:
        counts = torch.where(last, 1, counts)
        chance[starts[1:][last & (batch.lengths > 0)].long() - 1] = 0.0  # the first to be taken
    order = (rows + chance).argsort()
    rank = torch.arange(len(tokens), device=tokens.device) - starts[rows]
    at = order[rank < counts[rows]].sort().values
    return Masked(Packed(tokens.index_fill(0, at, mask_token), starts), at, tokens[at] - FIRST)


def cut(tokens: Tensor, first: Tensor, lengths: Tensor) -> Packed:
    """Take stretches of a flat array.

    Shape:
        tokens `[T]`; first, lengths `[B]`.
    """
    starts = starts_of(lengths)
    rows = torch.repeat_interleave(lengths)
    return Packed(tokens[torch.arange(len(rows), device=tokens.device) + (first - starts[:-1])[rows]], starts)


def newest(histories: Packed, max_len: int) -> Packed:
    """Leave out the oldest items of histories with more than `max_len`."""
    lengths = histories.lengths.clamp(max=max_len)
    return cut(histories.tokens, histories.starts[1:] - lengths, lengths)


def ask(histories: Packed, max_len: int, mask_token: int) -> Packed:
    """Put a [MASK] behind each history, and leave out its oldest items where there are too many."""
    kept = newest(histories, max_len - 1)
    starts = starts_of(kept.lengths + 1)
    tokens = kept.tokens.new_full((len(kept.tokens) + len(kept.lengths),), mask_token)
    rows = kept.rows()
    tokens[torch.arange(len(rows), device=rows.device) + rows] = kept.tokens
    return Packed(tokens, starts)


def next_items(batch: Packed) -> Masked:
    """Ask at each token for the one behind it: the histories without their last items, and these as targets.

    An empty history stays empty.
    """
    lengths = (batch.lengths - 1).clamp(min=0)
    kept = cut(batch.tokens, batch.starts[:-1], lengths)
    targets = cut(batch.tokens, batch.starts[:-1] + 1, lengths).tokens - FIRST
    return Masked(kept, torch.arange(len(targets), device=targets.device), targets)
