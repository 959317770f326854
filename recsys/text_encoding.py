"""Many texts through an encoder: in batches of like length, so that there are hardly any pads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from manyheads.recsys.masking import cut, newest
from manyheads.recsys.models.encoder import FIRST, Packed
from manyheads.recsys.models.recformer import Recformer, unit
from manyheads.recsys.texts import ItemTexts, text_batch

MOST_KNOWN = 1 << 14  # items that a map of tables is found by
RIDGE = 1e-3  # of a direction's share of the items, below which it is left as it is
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


@torch.no_grad()
def place_items(model: Recformer, known: ItemTexts, new: ItemTexts, max_tokens: int) -> Tensor:
    """Return where new items stand in a model's table, rows of length 1.

    Fine-tuning moves the encoder on from the one that made the table. What it makes of new items is brought
    there by the linear map that brings the known ones to their rows, found by least squares.

    Args:
        model: With a table.
        known: Its items; a few thousand of them will do for the map.
        new: Others.
        max_tokens: Of a text.

    Shape:
        The result `[new, H]`.
    """
    assert model.item_embedding is not None
    some = torch.arange(0, len(known), max(1, len(known) // MOST_KNOWN), device=known.ids.device)
    now = unit(encode_items(model, known.select(some), max_tokens)).double()
    then = unit(model.item_embedding.weight[some].float()).double()
    found = unit(encode_items(model, new, max_tokens)).double()
    ridge = RIDGE * len(some) * torch.eye(now.shape[1], dtype=now.dtype, device=now.device)
    change = torch.linalg.solve(now.T @ now + ridge, now.T @ (then - now))  # 0 where nothing has moved
    return unit(found + found @ change).float()


@contextmanager
def evaluating(model: Recformer) -> Iterator[None]:
    """Leave dropout out for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
