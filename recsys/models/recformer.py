"""Recformer: histories read as text, by a Longformer that knows items. Li et al. 2023, arXiv 2305.13731.

Parameters have the published names. Shapes: B texts, N tokens, M hidden tokens, H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.recsys.losses import cross_entropy
from manyheads.recsys.models.encoder import Items, Packed
from manyheads.recsys.models.text_encoder import Pooler, TextEncoder, TextSizes, TextStates
from manyheads.recsys.texts import ItemTexts, TextBatch, text_batch
from manyheads.recsys.word_masking import MaskedText


class LanguageHead(nn.Module):
    """From states to words; the table of words is not the embeddings' own.

    Shape:
        x `[M, H]`.
    """

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.dense, self.layer_norm = (
            nn.Linear(sizes.hidden_size, sizes.hidden_size),
            nn.LayerNorm(sizes.hidden_size),
        )
        self.decoder = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(sizes.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return what words are compared with."""
        y: Tensor = self.layer_norm(F.gelu(project(self.dense, x)))
        return y

    def words(self) -> Items:
        """Return the words."""
        return Items(self.decoder.weight, self.bias)


class Recformer(nn.Module):
    """The text encoder; a head of words for pretraining; a table of items' texts for what comes after.

    Scores are cosines divided by a temperature. The table is not trained: it holds what the encoder made of
    the items, and is refreshed from it (`set_items`).

    Args:
        sizes: Of the encoder.
        num_items: Rows of the table; 0 for none.
        language_head: With the head.
        temperature: Divides cosines.
    """

    def __init__(
        self, sizes: TextSizes, num_items: int = 0, language_head: bool = False, temperature: float = 0.05
    ) -> None:
        super().__init__()
        self.num_items, self.temperature = num_items, temperature
        self.longformer = TextEncoder(sizes)
        self.lm_head = LanguageHead(sizes) if language_head else None
        self.item_embedding: nn.Embedding | None = None
        if num_items:
            self.item_embedding = nn.Embedding(num_items, sizes.hidden_size)
            self.item_embedding.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, batch: TextBatch) -> Tensor:
        """Give texts, of histories or of items, their places among each other, `[B, H]`."""
        states: TextStates = self.longformer(batch)
        return states.pooled

    def texts(self, items: ItemTexts, histories: Packed, max_tokens: int = 1024) -> TextBatch:
        """Put histories, or single items, together as texts of no more items and tokens than it takes."""
        sizes = self.longformer.sizes
        return text_batch(items, histories, sizes.max_items, min(max_tokens, sizes.max_tokens))

    def queries(self, batch: TextBatch) -> Tensor:
        """Return what foretells each history's next item, `[B, H]`, of length 1."""
        return unit(self(batch))

    def items(self) -> Items:
        """Return what queries are compared with.

        Raises:
            UsageError: The model was built without items.
        """
        if self.item_embedding is None:
            raise UsageError("this recformer has no table of items: build it with num_items")
        return Items(unit(self.item_embedding.weight) / self.temperature)

    @torch.no_grad()
    def set_items(self, first: int, texts: Tensor) -> None:
        """Put what the encoder made of items into the table, from number `first` on."""
        assert self.item_embedding is not None
        self.item_embedding.weight[first : first + len(texts)] = texts

    def language_loss(self, masked: MaskedText) -> Tensor:
        """Return the loss over hidden tokens; 0 where there is none.

        Raises:
            UsageError: The model was built without the head.
        """
        if self.lm_head is None:
            raise UsageError("this recformer has no head of words: build it with language_head")
        states: TextStates = self.longformer(masked.batch)
        hidden = states.tokens.flatten(0, 1)[masked.at]  # before the head: few tokens are hidden
        return cross_entropy(self.lm_head(hidden), masked.targets, self.lm_head.words())


class Pretraining(NamedTuple):
    """What a pretraining step finds.

    Args:
        loss: To be minimised.
        contrastive: The part of it that tells each history's next item from the others'.
        scores: Histories by items, `[B, B]`.
    """

    loss: Tensor
    contrastive: Tensor
    scores: Tensor


def pretraining(
    model: Recformer,
    histories: TextBatch,
    items: TextBatch,
    masked: tuple[MaskedText, ...] = (),
    weight: float = 0.1,
    targets: Tensor | None = None,
    log_chance: Tensor | None = None,
) -> Pretraining:
    """Return the loss of histories with their next items, each among all items of the batch, and of words.

    Args:
        model: With a head of words, where there are masked texts.
        histories: What came before.
        items: What came next, row by row; or, with targets, the batch's different items.
        masked: Both again with hidden words; each is another pass of the encoder.
        weight: Of each of the losses of words.
        targets: Which of the items came next; without it an item that comes twice is held against itself, as
            in the published code.
        log_chance: The logarithm of each of the items' chance to be in a batch: with it the softmax over a
            batch stands for that over the catalogue (Yi et al. 2019, "Sampling-bias-corrected neural
            modeling"); without it popular items, which are held against others more often, end too low.

    Shape:
        targets `[B]`; log_chance `[items of the batch]`.
    """
    queries = model.queries(histories)
    table = Items(unit(model(items)) / model.temperature)
    rows = torch.arange(len(queries), device=queries.device) if targets is None else targets
    scores = queries @ table.weight.T
    if log_chance is not None:
        scores = scores - log_chance
    contrastive = F.cross_entropy(scores, rows)
    loss = contrastive
    for each in masked:
        loss = loss + weight * model.language_loss(each)
    return Pretraining(loss, contrastive, scores)


def unit(x: Tensor) -> Tensor:
    """Bring rows to a length of 1."""
    return F.normalize(x, dim=-1, eps=1e-8)


def recformer(
    vocab_size: int,
    num_items: int = 0,
    language_head: bool = False,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    inner_size: int = 512,
    positions: int = 1026,
    max_items: int = 50,
    window: int = 64,
    dropout: float = 0.1,
    pooler: Pooler = "cls",
    attn_dropout: float = 0.0,
) -> Recformer:
    """Build a Recformer of any size.

    Args:
        vocab_size: Tokens.
        num_items: Rows of the table of items; 0 for none.
        language_head: With the head of words that pretraining needs.
        hidden_size: Width, a multiple of heads.
        layers: Layers.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets.
        positions: Rows of the table of positions: two more than tokens of a text.
        max_items: Items of a text at most.
        window: Longformer's attention_window: half of it to each side of a token.
        dropout: Probability, in training, for what layers add, and for the embeddings.
        pooler: A text is its first token's state ("cls"), or a mean ("avg").
        attn_dropout: Probability that an attention weight is dropped, in training; costs speed.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Example:
        >>> model = recformer(vocab_size=8192, num_items=1682)
    """
    if num_items < 0:
        raise UsageError(f"recformer: num_items must be positive, or 0, not {num_items}")
    sizes = TextSizes(
        vocab_size,
        hidden_size,
        layers,
        heads,
        inner_size,
        positions,
        max_items,
        window,
        dropout,
        pooler,
        attn_dropout,
    )
    return Recformer(sizes, num_items, language_head)


def recformer_base(
    num_items: int = 0,
    language_head: bool = False,
    vocab_size: int = 50265,
    dropout: float = 0.1,
) -> Recformer:
    """Build the published Recformer: a Longformer-base with a window of 64.

    Args:
        num_items: Rows of the table of items; 0 for none.
        language_head: With the head of words that pretraining needs.
        vocab_size: Tokens.
        dropout: Probability, in training, for what layers add, and for the embeddings.

    Raises:
        UsageError: A size is not positive.
    """
    return recformer(vocab_size, num_items, language_head, 768, 12, 12, 3072, 4098, dropout=dropout)
