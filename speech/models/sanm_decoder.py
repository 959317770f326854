"""Paraformer's decoder: all tokens at once, from one vector a token and the encoded recording.

Source: Gao et al. 2022 (arXiv 2206.08317). Names and shapes of the published code. Its layers are unusual:
the feed-forward part comes first and has no residual of its own; the last one, alone, has none at all; there
are no positions.

Layout: B recordings, N tokens, T encoded rows, D channels, V words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import depthwise_conv1d
from manyheads.core.products import project
from manyheads.speech.models.sanm import EPS, Past, Rows, check_sizes, pack, remember, unpack


class NormedFeedForward(nn.Module):
    """`w_2(norm(relu(w_1(x))))`, the second map without a bias.

    Args:
        dim: Width of input and output.
        units: Width between.
        dropout: Of what is between.

    Shape:
        x and the result `[..., dim]`.
    """

    def __init__(self, dim: int, units: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_1, self.w_2 = nn.Linear(dim, units), nn.Linear(units, dim, bias=False)
        self.norm = nn.LayerNorm(units, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every token."""
        between = F.dropout(project(self.w_1, x).relu(), self.dropout, self.training)
        return project(self.w_2, self.norm(between))


class Memory(nn.Module):
    """FSMN's memory alone, in the place of self-attention.

    Args:
        dim: Channels.
        width: Tokens that a filter spans.
        shift: How many of them it reaches further back than centred; (width - 1) / 2 makes it causal.
        dropout: Of the result.

    Shape:
        x and the result `[B, N, dim]`.
    """

    def __init__(self, dim: int, width: int, shift: int, dropout: float) -> None:
        super().__init__()
        self.width, self.shift, self.dropout = width, shift, dropout
        self.fsmn_block = nn.Conv1d(dim, dim, width, groups=dim, bias=False)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Remember within each row; zeros in the place of padding."""
        y = remember(x, self.fsmn_block.weight, self.shift, rows)
        return rows.clear(F.dropout(y, self.dropout, self.training))

    def chunk(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Go on behind earlier tokens, of which `past` `[B, D, width - 1]` is left; None at the start."""
        y, left = depthwise_conv1d(
            x, self.fsmn_block.weight[:, 0], causal=True, initial_state=past, return_state=True
        )
        return y + x, left


class CrossAttention(nn.Module):
    """Tokens attend to the encoded recording.

    Args:
        dim: Channels of both.
        heads: Divides dim.
        dropout: Of the weights.

    Shape:
        x and the result `[B, N, dim]`; encoded `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q, self.linear_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.linear_k_v = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, rows: Rows, encoded: Tensor, encoded_rows: Rows) -> Tensor:
        """Attend to the encoded rows that count."""
        k, v = project(self.linear_k_v, encoded).chunk(2, -1)
        return self._attend(x, rows, k, v, encoded_rows)

    def chunk(self, x: Tensor, encoded: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Attend to a window and to what was kept of earlier ones.

        Returns:
            The result, and all keys and values that were seen.
        """
        k, v = project(self.linear_k_v, encoded).chunk(2, -1)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        return self._attend(x, Rows(), k, v, Rows()), (k, v)

    def _attend(self, x: Tensor, rows: Rows, k: Tensor, v: Tensor, encoded_rows: Rows) -> Tensor:
        rate = self.dropout if self.training else 0.0
        attended = encoded_rows.attend(project(self.linear_q, x), k, v, self.heads, rate, rows)
        return project(self.linear_out, attended)


class DecoderLayer(nn.Module):
    """Feed-forward, memory, attention to the recording.

    Args:
        dim, heads, units, width, shift: Of the parts.
        dropout: Of every part.

    Shape:
        x and the result `[B, N, dim]`; encoded `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, units: int, width: int, shift: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = Memory(dim, width, shift, dropout)
        self.src_attn = CrossAttention(dim, heads, dropout)
        self.feed_forward = NormedFeedForward(dim, units, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, EPS) for _ in range(3))

    def forward(self, x: Tensor, rows: Rows, encoded: Tensor, encoded_rows: Rows) -> Tensor:
        """Decode rows of tokens."""
        y = self.self_attn(self.norm2(self.feed_forward(self.norm1(x))), rows)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.src_attn(self.norm3(x), rows, encoded, encoded_rows)
        return x + F.dropout(y, self.dropout, self.training)

    def chunk(
        self, x: Tensor, encoded: Tensor, memory: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor, Past]:
        """Decode the next tokens; what the parts' `chunk` return is passed on."""
        y, memory = self.self_attn.chunk(self.norm2(self.feed_forward(self.norm1(x))), memory)
        x = x + y
        y, seen = self.src_attn.chunk(self.norm3(x), encoded, past)
        return x + y, memory, seen


class LastLayer(nn.Module):
    """A norm and a feed-forward part.

    Args:
        dim, units, dropout: As `NormedFeedForward`.

    Shape:
        x and the result `[..., dim]`.
    """

    def __init__(self, dim: int, units: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.feed_forward = nn.LayerNorm(dim, EPS), NormedFeedForward(dim, units, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every token."""
        result: Tensor = self.feed_forward(self.norm1(x))
        return result


class SanmDecoder(nn.Module):
    """Paraformer's decoder.

    Args:
        vocab_size: Tokens of the list.
        dim, heads, units, width: Of the layers.
        blocks: Layers with attention; one without follows them.
        shift: Of the memory; (width - 1) / 2, causal, for streaming.
        dropout: Of every part.

    Shape:
        tokens `[B, N, dim]`, a vector each; counts `[B]`; encoded `[B, T, dim]`; lengths `[B]`; logits
        `[B, N, vocab_size]`.

    Raises:
        UsageError: A size is not positive, the heads do not divide dim, or the shift is beyond the filter.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        heads: int = 4,
        units: int = 2048,
        blocks: int = 16,
        width: int = 11,
        shift: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes("SAN-M decoder", dim, heads, units, blocks, width, dropout)
        if vocab_size < 3:
            raise UsageError(f"SAN-M decoder: blank, start and end are three of the tokens, not {vocab_size}")
        if not 0 <= shift <= width - 1 - (width - 1) // 2:
            raise UsageError(f"SAN-M decoder: a filter of {width} cannot be shifted by {shift}")
        self.causal = (width - 1) // 2 + shift == width - 1
        self.embed = nn.Sequential(nn.Embedding(vocab_size, dim))  # of the glancing sampler alone
        self.decoders = nn.ModuleList(
            DecoderLayer(dim, heads, units, width, shift, dropout) for _ in range(blocks)
        )
        self.decoders3 = nn.ModuleList([LastLayer(dim, units, dropout)])
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
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """The last layer and the norm."""
        for layer in self.decoders3:
            x = layer(x)
        result: Tensor = self.after_norm(x)
        return result
