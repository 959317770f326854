"""What of recommenders and readers of texts leaves for other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from manyheads.apps.exportable import BATCH, Exportable, Inputs
from manyheads.recsys.models.cross_attention import CrossAttentionFusion
from manyheads.recsys.models.encoder import FIRST, Packed, starts_of
from manyheads.recsys.models.recformer import Recformer
from manyheads.recsys.texts import TextBatch, text_batch

TEXT = ("input_ids", "token_type_ids", "item_position_ids")
TEXT_AXES = {name: {0: BATCH, 1: "tokens"} for name in TEXT}


class _Histories(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor) -> Tensor:
        model = cast(Any, self.model)
        if hasattr(model, "mask_token"):
            items = torch.cat([items, torch.full_like(items[:, :1], model.mask_token)], 1)
        states = model(items)[:, -1]
        weight, bias = model.items()
        scores = states @ weight.T
        return cast(Tensor, scores if bias is None else scores + bias)


def histories(model: nn.Module, num_items: int, max_len: int, first: int) -> Exportable:
    """Histories, the newest item last and zeros before the first, to a score of every item.

    Args:
        max_len: Items of a history at most; older ones are left out.
        first: The token of item 0.
    """

    def pad(rows: Sequence[Tensor]) -> Inputs:
        newest = [row[-max_len:].long() + first for row in rows]
        return (nn.utils.rnn.pad_sequence(newest, batch_first=True, padding_side="left"),)

    def take(samples: Sequence[Any]) -> Inputs:
        return pad([torch.as_tensor(sample.items) for sample in samples])

    def draw(count: int) -> Inputs:
        return pad([torch.randint(num_items, (max_len - i % max_len,)) for i in range(count)])

    axes = {"items": {0: BATCH, 1: "length"}}
    ranges = {"length": (2, max_len)}
    return Exportable(_Histories(model), ("items",), ("scores",), axes, take, draw, ranges)


class _Texts(nn.Module):
    def __init__(self, model: Recformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, item_position_ids: Tensor) -> Tensor:
        found = self.model.queries(TextBatch(input_ids, token_type_ids, item_position_ids))
        return found if self.model.item_embedding is None else found @ self.model.items().weight.T


def drawn_texts(count: int, tokens: int, vocab_size: int, items: int) -> Inputs:
    """Return random texts: names and values of three items each."""
    ids = torch.randint(3, vocab_size, (count, tokens))
    types = torch.arange(tokens).remainder(2).add(1).expand(count, -1).clone()
    places = torch.arange(tokens).div(tokens / min(3, items), rounding_mode="floor").long() + 1
    types[:, 0], ids[:, 0] = 0, 0
    return ids, types, places.expand(count, -1).clone().index_fill(1, torch.tensor([0]), 0)


def read_histories(model: Recformer, encode: Callable[[Sequence[Any]], TextBatch] | None) -> Exportable:
    """Histories as tokens of their items' texts, to a score of every item, or without a table to a state.

    Args:
        encode: Makes tokens of what the predictor prepared.
    """
    sizes = model.longformer.sizes

    def take(samples: Sequence[Any]) -> Inputs:
        assert encode is not None
        return tuple(encode(samples))

    def draw(count: int) -> Inputs:
        return drawn_texts(count, min(24, sizes.max_tokens), sizes.vocab_size, sizes.max_items)

    outputs = ("query",) if model.item_embedding is None else ("scores",)
    ranges = {"tokens": (2, sizes.max_tokens)}
    return Exportable(_Texts(model), TEXT, outputs, TEXT_AXES, take, draw, ranges)


class _Customers(nn.Module):
    def __init__(self, model: CrossAttentionFusion) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        item_position_ids: Tensor,
        numbers: Tensor,
        kinds: Tensor,
    ) -> Tensor:
        texts = TextBatch(input_ids, token_type_ids, item_position_ids)
        return cast(Tensor, self.model(texts, numbers, kinds))


def customers(
    model: CrossAttentionFusion,
    numeric: int,
    categories: Sequence[int],
    collate: Callable[[Sequence[Any]], Any] | None,
) -> Exportable:
    """Texts as tokens and their variables, to logits.

    Args:
        numeric: Variables that are numbers.
        categories: How many each of the others has.
        collate: The predictor's.
    """
    sizes = model.longformer.sizes

    def take(samples: Sequence[Any]) -> Inputs:
        assert collate is not None
        found = collate(samples)
        return *found.texts, found.numbers, found.kinds

    def draw(count: int) -> Inputs:
        texts = drawn_texts(count, min(24, sizes.max_tokens), sizes.vocab_size, sizes.max_items)
        kinds = [torch.randint(number, (count, 1)) for number in categories]
        return *texts, torch.randn(count, numeric), torch.cat([*kinds, torch.zeros(count, 0).long()], 1)

    axes = TEXT_AXES | {"numbers": {0: BATCH}, "kinds": {0: BATCH}}
    ranges = {"tokens": (2, sizes.max_tokens)}
    return Exportable(_Customers(model), tuple(axes), ("logits",), axes, take, draw, ranges)


def of_predictor(predictor: Any) -> Exportable:
    """Return what is exported of a predictor's model."""
    model = predictor.model
    if isinstance(model, CrossAttentionFusion):
        of = predictor.customers.model_inputs()
        return customers(model, of["numeric"], of["categories"], predictor.collate)
    if not isinstance(model, Recformer):
        most = model.encoder.sizes.max_len - hasattr(model, "mask_token")
        return histories(model, model.num_items, most, FIRST)

    def encode(samples: Sequence[Any]) -> TextBatch:
        scorer, items = predictor.scorer, [torch.as_tensor(each.items).long() for each in samples]
        starts = starts_of(torch.tensor([len(each) for each in items]))
        cut = scorer.kept.cut
        packed = Packed(torch.cat(items) + FIRST, starts)
        return text_batch(scorer.texts, packed, cut.max_items, cut.max_tokens)

    return read_histories(model, encode)
