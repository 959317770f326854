"""Many texts through an encoder: in batches of like length, so that there are hardly any pads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from manyheads.recsys.masking import cut, newest
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.models.recformer import Recformer
from manyheads.recsys.texts import ItemTexts, text_batch

CPU_TOKENS, TOKENS = 1 << 13, 1 << 17  # of a batch, pads among them


def text_lengths(items: ItemTexts, histories: Packed, max_items: int, max_tokens: int) -> Tensor:
    """Return how many tokens `text_batch` makes of each history, `[B]`."""
    kept = newest(histories, max_items)
    of_items = torch.cat([kept.tokens.new_zeros(1), items.lengths[kept.tokens.long() - FIRST].cumsum(0)])
    starts = kept.starts.long()
    return (1 + of_items[starts[1:]] - of_items[starts[:-1]]).clamp(max=max_tokens)


def encode(
    model: Recformer,
    items: ItemTexts,
    histories: Packed,
    max_items: int,
    max_tokens: int,
    tokens: int | None = None,
) -> Tensor:
    """Return what the model makes of histories, or of single items: `[B, H]`, float32.

    Args:
        model: As it is: in evaluation mode for what is to be kept.
        items: Texts of the items, on the model's device.
        histories: As `text_batch` takes them, on the model's device.
        max_items: Of a history.
        max_tokens: Of a text.
        tokens: Of a batch; one text alone may have more. None takes as many as are fast.
    """
    lengths = text_lengths(items, histories, max_items, max_tokens)
    most = tokens or (CPU_TOKENS if lengths.device.type == "cpu" else TOKENS)
    found = torch.empty(len(lengths), model.longformer.sizes.hidden_size, device=lengths.device)
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    first = 0
    while first < len(sizes):
        rows = order[first : first + max(1, most // sizes[first])]
        part = cut(histories.tokens, histories.starts[:-1][rows], histories.lengths[rows])
        found[rows] = model(text_batch(items, part, max_items, max_tokens)).float()
        first += len(rows)
    return found


def encode_items(model: Recformer, items: ItemTexts, max_tokens: int) -> Tensor:
    """Return what the model, without dropout, makes of items: `[items, H]`."""
    numbers = torch.arange(len(items), device=items.ids.device)
    alone = Packed(numbers + FIRST, torch.arange(len(items) + 1, device=numbers.device).int())
    with torch.no_grad(), evaluating(model):
        return encode(model, items, alone, 1, max_tokens)


@contextmanager
def evaluating(model: Recformer) -> Iterator[None]:
    """Leave dropout out for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
