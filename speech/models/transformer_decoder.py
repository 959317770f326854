"""The decoder of Paraformer's AISHELL recipe: a Transformer's, over all tokens at once.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); Gao et al. 2022 (arXiv 2206.08317). Names and shapes of the
published code. Tokens see later ones, and have no positions, but for those that the glancing sampler shows.

Layout: B recordings, N tokens, T encoded rows, D channels, V words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.speech.models.conformer import waves
from manyheads.speech.models.sanm import EPS, FeedForward, Rows, check_sizes, pack, unpack


class Positioned(nn.Module):
    """Scale vectors and add their positions, counted from 0 on; what is behind the decoder's embedding.

    Args:
        dim: Channels; even.
        dropout: Of the sum.

    Shape:
        x and the result `[B, N, dim]`.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.dropout = dim, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Add the positions."""
        table = waves(torch.arange(x.shape[1], device=x.device), self.dim, x)
        return F.dropout(x * self.dim**0.5 + table, self.dropout, self.training)


class MultiHeadAttention(nn.Module):
    """Attention within the tokens, or from them to the recording.

    Args:
        dim: Width of input and output.
        heads: Divides dim.

    Shape:
        x and the result `[B, N, dim]`; seen `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim) for _ in range(3))
        self.linear_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rows: Rows, seen: Tensor, seen_rows: Rows) -> Tensor:
        """Attend to the rows of `seen` that count."""
        q, k, v = project(self.linear_q, x), project(self.linear_k, seen), project(self.linear_v, seen)
        return project(self.linear_out, seen_rows.attend(q, k, v, self.heads, queries=rows))


class TransformerLayer(nn.Module):
    """Attention within the tokens, attention to the recording, feed-forward; norms before each.

    Args:
        dim, heads, units: Of the parts.
        dropout: Of every part but the attention's weights, as in the recipe.

    Shape:
        x and the result `[B, N, dim]`; encoded `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn, self.src_attn = MultiHeadAttention(dim, heads), MultiHeadAttention(dim, heads)
        self.feed_forward = FeedForward(dim, units, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, EPS) for _ in range(3))

    def forward(self, x: Tensor, rows: Rows, encoded: Tensor, encoded_rows: Rows) -> Tensor:
        """Decode rows of tokens."""
        y = self.norm1(x)
        x = x + self._drop(self.self_attn(y, rows, y, rows))
        x = x + self._drop(self.src_attn(self.norm2(x), rows, encoded, encoded_rows))
        return x + self._drop(self.feed_forward(self.norm3(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TransformerDecoder(nn.Module):
    """The decoder; `SanmDecoder` in another form.

    Args:
        vocab_size: Tokens of the list.
        dim, heads, units: Of the layers.
        blocks: How many.
        dropout: Of every part.

    Shape:
        tokens `[B, N, dim]`, a vector each; counts `[B]`; encoded `[B, T, dim]`; lengths `[B]`; logits
        `[B, N, vocab_size]`.

    Raises:
        UsageError: A size is not positive, the heads do not divide dim, or dim is odd.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        heads: int = 4,
        units: int = 2048,
        blocks: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes("Transformer decoder", dim, heads, units, blocks, 1, dropout)
        if vocab_size < 3 or dim % 2:
            raise UsageError(
                f"Transformer decoder: vocab_size ({vocab_size}) must be 3 or more (blank, start and end are"
                f" tokens), dim ({dim}) even"
            )
        embedding = nn.Embedding(vocab_size, dim)
        self.embed = nn.Sequential(embedding, Positioned(dim, dropout))  # of the glancing sampler alone
        self.decoders = nn.ModuleList(TransformerLayer(dim, heads, units, dropout) for _ in range(blocks))
        self.after_norm = nn.LayerNorm(dim, EPS)
        self.output_layer = nn.Linear(dim, vocab_size)

    def forward(
        self, tokens: Tensor, counts: Tensor | None, encoded: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """Decode; what lies behind a row's count means nothing."""
        return project(self.output_layer, self.hidden(tokens, counts, encoded, lengths))

    def hidden(
        self, tokens: Tensor, counts: Tensor | None, encoded: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """What the output layer reads, `[B, N, dim]`."""
        rows = Rows.padded(counts, tokens.shape[1])
        return self._run(tokens, rows, encoded, Rows.padded(lengths, encoded.shape[1]))

    def packed(self, tokens: Tensor, counts: Tensor, encoded: Tensor, lengths: Tensor) -> Tensor:
        """Decode without the padding of tokens and encoded rows; logits of 0 behind a row's count."""
        if not int(counts.sum()):
            return tokens.new_zeros(*tokens.shape[:2], self.output_layer.out_features)
        x, seen = pack(tokens, counts), pack(encoded, lengths)
        hidden = self._run(x, Rows.packed(counts), seen, Rows.packed(lengths))
        return unpack(project(self.output_layer, hidden), counts, tokens.shape[1])

    def _run(self, x: Tensor, rows: Rows, encoded: Tensor, encoded_rows: Rows) -> Tensor:
        for layer in self.decoders:
            x = layer(x, rows, encoded, encoded_rows)
        result: Tensor = self.after_norm(x)
        return result
