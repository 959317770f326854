"""Texts with their writers' variables: a text's tokens attend to the variables, then the text is classified.

The text's tokens are the queries, the variables (age, region, habits ...) the keys and values. The system is
known from its abstract alone ("consumer preferences BERT and cross-attention"): the layers' form is ours.

Shapes: B customers, N tokens, C variables, H width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.layers.attention import MultiHeadAttention
from manyheads.core.products import project
from manyheads.core.sizes import check_sizes
from manyheads.recsys.models.text_encoder import TextEncoder, TextSizes, TextStates
from manyheads.recsys.texts import TextBatch

MISSING = -1  # a category that is not known; a number that is not is NaN


class Variables(nn.Module):
    """A token for each of a customer's variables, and one of its own for each that is not known.

    Args:
        numeric: Variables that are numbers, of a mean of 0 and a deviation of 1.
        categories: How many each of the others has.
        dim: Width.

    Shape:
        numbers `[B, numeric]`, NaN where not known; kinds `[B, len(categories)]`, -1 where not known; the
        result `[B, C, dim]`.

    Raises:
        UsageError: There is no variable.
    """

    first: Tensor

    def __init__(self, numeric: int, categories: tuple[int, ...], dim: int) -> None:
        super().__init__()
        count = numeric + len(categories)
        if numeric < 0 or not count or min(categories, default=1) < 1:
            raise UsageError(
                f"cross_attention: it needs variables: numeric {numeric}, categories {categories}"
            )
        self.numeric, self.categories = numeric, categories
        self.scale = nn.Parameter(torch.empty(numeric, dim).normal_(std=0.02))
        self.table = nn.Parameter(torch.empty(sum(categories), dim).normal_(std=0.02))
        self.column = nn.Parameter(torch.empty(count, dim).normal_(std=0.02))
        self.missing = nn.Parameter(torch.empty(count, dim).normal_(std=0.02))
        first = [sum(categories[:i]) for i in range(len(categories))]
        self.register_buffer("first", torch.tensor(first, dtype=torch.int64), persistent=False)

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        """Embed.

        Raises:
            ValueError: Another number of variables.
            IndexError: A category that is not there (on a CPU).
        """
        if numbers.shape[1:] != (self.numeric,) or kinds.shape[1:] != (len(self.categories),):
            raise ValueError(
                f"variables must be {self.numeric} numbers and {len(self.categories)} categories, not "
                f"{list(numbers.shape[1:])} and {list(kinds.shape[1:])}"
            )
        if kinds.is_cpu and not torch.compiler.is_compiling():
            self._check(kinds)
        unknown = torch.cat([numbers.isnan(), kinds == MISSING], 1)[..., None]
        scaled = numbers.nan_to_num(0.0)[..., None].to(self.scale.dtype) * self.scale
        chosen = F.embedding(kinds.clamp(min=0) + self.first, self.table)
        known = torch.cat([scaled, chosen], 1) + self.column
        return torch.where(unknown, self.missing, known)

    def _check(self, kinds: Tensor) -> None:
        for column, size in enumerate(self.categories):
            wrong = (kinds[:, column] < MISSING) | (kinds[:, column] >= size)
            if wrong.any():
                raise IndexError(
                    f"category {int(kinds[wrong, column][0])} of variable {column}, which has {size}"
                )


class FusionLayer(nn.Module):
    """Tokens attend to variables, then a feed-forward net; norms behind the residuals.

    Shape:
        x and the result `[B, N, H]`; variables `[B, C, H]`.
    """

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, dropout=dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, variables: Tensor) -> Tensor:
        """Give the tokens' new states."""
        x = self.norm1(x + self._drop(self.attention(x, variables)))
        y = project(self.fc2, F.gelu(project(self.fc1, x)))
        return cast(Tensor, self.norm2(x + self._drop(y)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossAttentionFusion(nn.Module):
    """The text encoder of Recformer, layers that join it with variables, the mean of the tokens, classes.

    Args:
        sizes: Of the encoder, whose weights may be Recformer's (`longformer`).
        classes: Scores that are given out.
        numeric, categories: As in `Variables`.
        fusion_layers: Layers of cross-attention.
    """

    def __init__(
        self, sizes: TextSizes, classes: int, numeric: int, categories: tuple[int, ...], fusion_layers: int
    ) -> None:
        super().__init__()
        dim = sizes.hidden_size
        self.longformer = TextEncoder(sizes)
        self.variables = Variables(numeric, categories, dim)
        self.fusion = nn.ModuleList(
            FusionLayer(dim, sizes.heads, sizes.inner_size, sizes.dropout) for _ in range(fusion_layers)
        )
        self.head = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, batch: TextBatch, numbers: Tensor, kinds: Tensor) -> Tensor:
        """Score the classes, `[B, classes]`."""
        states: TextStates = self.longformer(batch)
        x, variables = states.tokens, self.variables(numbers, kinds)
        for layer in self.fusion:
            x = layer(x, variables)
        real = batch.real.to(x.dtype)[..., None]
        return project(self.head, (x * real).sum(1) / real.sum(1))


def cross_attention_fusion(
    vocab_size: int,
    classes: int,
    numeric: int = 0,
    categories: list[int] | None = None,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    inner_size: int = 512,
    positions: int = 514,
    window: int = 64,
    fusion_layers: int = 2,
    dropout: float = 0.1,
) -> CrossAttentionFusion:
    """Build a classifier of texts and their customers' variables, of any size.

    Args:
        vocab_size: Tokens.
        classes: Scores that are given out.
        numeric: Variables that are numbers.
        categories: How many each of the other variables has.
        hidden_size: Width, a multiple of heads.
        layers: Layers of the text encoder.
        heads: Heads of attention.
        inner_size: Width within the feed-forward nets.
        positions: Rows of the table of positions: two more than tokens of a text.
        window: Longformer's attention_window: half of it to each side of a token.
        fusion_layers: Layers of cross-attention.
        dropout: Probability, in training, for what layers add, for weights of the cross-attention, and for
            the embeddings.

    Raises:
        UsageError: A size is not positive or does not fit, or there is no variable.

    Example:
        >>> model = cross_attention_fusion(8192, classes=3, numeric=1, categories=[2, 21])
    """
    check_sizes("cross_attention", {"classes": classes, "fusion_layers": fusion_layers})
    sizes = TextSizes(vocab_size, hidden_size, layers, heads, inner_size, positions, 50, window, dropout)
    return CrossAttentionFusion(sizes, classes, numeric, tuple(categories or ()), fusion_layers)
