"""Longformer with embeddings of items: what reads a history, or an item, as text.

Parameters have the published names. Sources: Beltagy et al. 2020 (arXiv 2004.05150); Li et al. 2023 (arXiv
2305.13731). Shapes: B texts, N tokens, H width.
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
from manyheads.recsys.texts import PAD_ID, TextBatch

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
        attn_dropout: Probability that an attention weight is dropped, in training.

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
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "layers", "heads", "inner_size", "positions", "max_items")
        shares = {"dropout": self.dropout, "attn_dropout": self.attn_dropout}
        check_sizes("recformer", {name: getattr(self, name) for name in names}, **shares)
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
        attend = LongformerAttention(sizes.hidden_size, sizes.heads, sizes.window // 2, sizes.attn_dropout)
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
