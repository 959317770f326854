"""Recformer: histories read as text, by a Longformer that knows items. Li et al. 2023, arXiv 2305.13731.

Parameters have the published names. Shapes: B texts, N tokens, M hidden tokens, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.local_attention import LongformerAttention
from manyheads.core.products import project
from manyheads.core.sizes import check_sizes
from manyheads.recsys.losses import cross_entropy
from manyheads.recsys.models.encoder import Items, Packed
from manyheads.recsys.texts import PAD_ID, ItemTexts, TextBatch, text_batch
from manyheads.recsys.word_masking import MaskedText

TYPES = 4  # <s>, name, value, pad
Pooler = Literal["cls", "avg"]


@dataclass(frozen=True)
class TextSizes:
    """How large a text encoder is.

    Args:
        vocab_size: Tokens.
        hidden_size: Width, a multiple of heads.
        layers: Layers.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets.
        positions: Rows of the table of positions: two more than tokens of a text.
        max_items: Items of a text at most.
        window: Longformer's attention_window: half of it to each side of a token.
        dropout: Probability, in training, for what layers add, and for the embeddings.
        pooler: A text is its first token's state ("cls"), or the mean ("avg") in which, as in the published
            code, the first token counts twice.

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    inner_size: int
    positions: int
    max_items: int
    window: int
    dropout: float
    pooler: Pooler = "cls"

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "layers", "heads", "inner_size", "positions", "max_items")
        check_sizes("recformer", {name: getattr(self, name) for name in names}, dropout=self.dropout)
        if self.hidden_size % self.heads:
            raise UsageError(
                f"recformer: hidden_size {self.hidden_size} is not a multiple of {self.heads} heads"
            )
        if self.window < 2 or self.window % 2:
            raise UsageError(f"recformer: window must be even and positive, not {self.window}")
        if self.pooler not in ("cls", "avg"):
            raise UsageError(f"recformer: pooler must be 'cls' or 'avg', not {self.pooler!r}")

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most."""
        return self.positions - PAD_ID - 1


class Embeddings(nn.Module):
    """Words, positions, types and items of tokens, added and normed.

    Shape:
        The batch `[B, N]`; the result `[B, N, H]`.
    """

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        dim = sizes.hidden_size
        self.word_embeddings = nn.Embedding(sizes.vocab_size, dim, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(sizes.positions, dim, padding_idx=PAD_ID)
        self.token_type_embeddings = nn.Embedding(TYPES, dim)
        self.item_position_embeddings = nn.Embedding(sizes.max_items + 1, dim)
        self.LayerNorm = nn.LayerNorm(dim)
        self.dropout = sizes.dropout

    def forward(self, batch: TextBatch) -> Tensor:
        """Embed."""
        real = batch.real.long()
        places = real.cumsum(1) * real + PAD_ID
        x = (
            self.word_embeddings(batch.input_ids)
            + self.position_embeddings(places)
            + self.token_type_embeddings(batch.token_type_ids)
            + self.item_position_embeddings(batch.item_position_ids)
        )
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class Added(nn.Module):
    """A linear map whose result is added to the residual and normed."""

    def __init__(self, inner: int, sizes: TextSizes) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, sizes.hidden_size), nn.LayerNorm(sizes.hidden_size)
        self.dropout = sizes.dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map and add."""
        x = F.dropout(project(self.dense, x), self.dropout, self.training)
        y: Tensor = self.LayerNorm(x + residual)
        return y


class TextLayer(nn.Module):
    """Attention within a window and to the first token, then a feed-forward net; norms behind the residuals.

    Shape:
        x and the result `[B, N, H]`; mask `[B, N]`.
    """

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        attend = LongformerAttention(sizes.hidden_size, sizes.heads, sizes.window // 2)
        self.attention = nn.ModuleDict({"self": attend, "output": Added(sizes.hidden_size, sizes)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.hidden_size, sizes.inner_size)})
        self.output = Added(sizes.inner_size, sizes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Give the tokens' new states."""
        x = self.attention["output"](self.attention["self"](x, 1, mask), x)
        y: Tensor = self.output(F.gelu(project(self.intermediate["dense"], x)), x)
        return y


class TextLayers(nn.Module):
    """A stack of layers, which lie under `layer`."""

    def __init__(self, layers: list[TextLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Give the tokens' states behind the last layer."""
        for layer in self.layer:
            x = layer(x, mask)
        return x


class TextStates(NamedTuple):
    """What an encoder makes of texts.

    Args:
        tokens: States of the tokens; those of pads mean nothing.
        pooled: The texts.

    Shape:
        tokens `[B, N, H]`; pooled `[B, H]`.
    """

    tokens: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """The embeddings and the layers.

    A text's states do not depend on its pads, which are behind it, nor on the texts beside it.

    Args:
        sizes: How large it is.
    """

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embeddings = Embeddings(sizes)
        self.encoder = TextLayers([TextLayer(sizes) for _ in range(sizes.layers)])

    def forward(self, batch: TextBatch) -> TextStates:
        """Read texts.

        Raises:
            ValueError: They have more tokens than there are positions.
        """
        length = batch.input_ids.shape[1]
        if length > self.sizes.max_tokens:
            raise ValueError(f"a text of {length} tokens, and the model takes {self.sizes.max_tokens}")
        x, mask = self.embeddings(batch), batch.real
        x = self.encoder(x, mask)
        if self.sizes.pooler == "cls":
            return TextStates(x, x[:, 0])
        weight = mask.to(x.dtype)
        weight = torch.cat([2 * weight[:, :1], weight[:, 1:]], 1)[..., None]
        return TextStates(x, (x * weight).sum(1) / weight.sum(1))


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
) -> Pretraining:
    """Return the loss of histories with their next items, each among all items of the batch, and of words.

    Args:
        model: With a head of words, where there are masked texts.
        histories: What came before.
        items: What came next, row by row.
        masked: Both again with hidden words; each is another pass of the encoder.
        weight: Of each of the losses of words.
    """
    queries = model.queries(histories)
    table = Items(unit(model(items)) / model.temperature)
    rows = torch.arange(len(queries), device=queries.device)
    scores = queries @ table.weight.T
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

    Raises:
        UsageError: A size is not positive or does not fit, an option is unknown.

    Example:
        >>> model = recformer(vocab_size=8192, num_items=1682)
    """
    if num_items < 0:
        raise UsageError(f"recformer: num_items must be positive, or 0, not {num_items}")
    sizes = TextSizes(
        vocab_size, hidden_size, layers, heads, inner_size, positions, max_items, window, dropout, pooler
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
