"""Paraformer on a recording that is still going on, chunk by chunk.

The encoder sees a window: some rows before the chunk, the chunk, some rows ahead, and what was kept of
earlier windows' keys and values. The predictor carries its running sum on, the decoder its memory and the
last windows' keys and values. Sources: Gao et al. 2020 (SCAMA, arXiv 2006.01712); the published streaming
code.

A chunk is written when its last row and the rows ahead are there: with the published sizes 600 ms a chunk,
and 300 ms ahead. How the rows come in makes no difference to the result.

Layout: one recording, T rows of features, N tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.core.errors import DataError, UsageError
from manyheads.core.ops import FireState, continuous_integrate_and_fire
from manyheads.core.products import project
from manyheads.speech.frontend import FrontEnd
from manyheads.speech.models.paraformer import Paraformer, greedy
from manyheads.speech.models.sanm import Past, SanmEncoder
from manyheads.speech.models.sanm_decoder import SanmDecoder


@dataclass(frozen=True)
class Chunks:
    """How a recording is cut, in rows of 60 ms.

    Attributes:
        before: Rows that are seen again before each chunk.
        size: Rows of a chunk.
        ahead: Rows that are seen after it, before it is written.
        encoder_back: Chunks of which the encoder keeps keys and values; 0 for none.
        decoder_back: Chunks of which the decoder does.

    Raises:
        UsageError: size is not positive, or another is negative.
    """

    before: int = 0
    size: int = 10
    ahead: int = 5
    encoder_back: int = 4
    decoder_back: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"chunks: size must be positive, not {self.size}")
        for name in ("before", "ahead", "encoder_back", "decoder_back"):
            if getattr(self, name) < 0:
                raise UsageError(f"chunks: {name} must not be negative, and is {getattr(self, name)}")


class Step(NamedTuple):
    """What a chunk gave.

    Attributes:
        ids: Its tokens, without blank, start and end.
        logits: `[1, N, V]`.
        encoded: The window's rows, `[1, before + rows + ahead, D]`.
        tokens: The predictor's vectors, `[1, N, D]`.
    """

    ids: list[int]
    logits: Tensor
    encoded: Tensor
    tokens: Tensor


class FeatureStream:
    """Recognise rows of features as they come.

    Args:
        model: In evaluation, with a causal decoder (`streaming=True`).
        chunks: How the recording is cut.

    Raises:
        UsageError: The model is in training, or its decoder is not causal.

    Example:
        >>> stream = FeatureStream(paraformer_large(streaming=True).eval())
        >>> ids = stream.push(rows) + stream.finish()
    """

    def __init__(self, model: Paraformer, chunks: Chunks | None = None) -> None:
        if model.training:
            raise UsageError("streaming: put the model in evaluation mode first (model.eval())")
        encoder, decoder = model.encoder, model.decoder
        if not isinstance(encoder, SanmEncoder) or not isinstance(decoder, SanmDecoder):
            raise UsageError("streaming: this model cannot (Conformer encoder); build a `paraformer`")
        if not decoder.causal:
            raise UsageError("streaming: the decoder sees later tokens; build the model with streaming=True")
        self.model, self.chunks = model, Chunks() if chunks is None else chunks
        self.encoder, self.decoder = encoder, decoder
        weight = encoder.after_norm.weight
        channels = encoder.layers[0].norm1.normalized_shape[0]
        overlap = self.chunks.before + self.chunks.ahead
        self.pending = weight.new_zeros(1, 0, channels)
        self.overlap = weight.new_zeros(1, overlap, channels)  # the last rows, with their positions
        self.seen = 0  # rows that were in a chunk
        self.ended = False
        self.encoder_past: list[Past | None] = [None] * len(encoder.layers)
        self.decoder_past: list[Past | None] = [None] * len(decoder.decoders)
        self.memories: list[Tensor | None] = [None] * len(decoder.decoders)
        self.fire_state: FireState | None = None

    def push(self, rows: Tensor) -> list[int]:
        """Take more rows `[T, F]`; return the tokens of the chunks that they complete.

        Raises:
            DataError: The rows are of another width, or the recording has ended.
        """
        if self.ended:
            raise DataError("streaming: the recording has ended; begin another stream")
        if rows.ndim != 2 or rows.shape[1] != self.pending.shape[2]:
            raise DataError(f"streaming: rows must be [T, {self.pending.shape[2]}], not {list(rows.shape)}")
        self.pending = torch.cat((self.pending, rows[None].to(self.pending)), 1)
        ids: list[int] = []
        while self.pending.shape[1] >= self.chunks.size:
            chunk, self.pending = self.pending.split(
                [self.chunks.size, self.pending.shape[1] - self.chunks.size], 1
            )
            ids += self.step(chunk).ids
        return ids

    def finish(self) -> list[int]:
        """End the recording; return the tokens that are left."""
        if self.ended or self.seen + self.pending.shape[1] == 0:
            self.ended = True
            return []
        chunk, self.pending = self.pending, self.pending[:, :0]
        return self.step(chunk, final=True).ids

    @torch.no_grad()
    def step(self, chunk: Tensor, final: bool = False) -> Step:
        """Recognise one chunk `[1, T, F]`; the last may be empty: then what was ahead is left."""
        self.ended = final
        encoded = self._encode(chunk)
        tokens = self._find(encoded, final)
        if tokens.shape[1]:
            logits = self._write(tokens, encoded)
        else:
            logits = tokens.new_zeros(1, 0, self.model.vocab_size)
        count = torch.tensor([tokens.shape[1]])
        return Step(greedy(logits, count)[0], logits, encoded, tokens)

    def _encode(self, chunk: Tensor) -> Tensor:
        encoder, chunks = self.encoder, self.chunks
        window = torch.cat((self.overlap, encoder.place(chunk, self.seen)), 1)
        self.seen += chunk.shape[1]
        self.overlap = window[:, window.shape[1] - self.overlap.shape[1] :]
        x = window
        for number, layer in enumerate(encoder.layers):
            past = self.encoder_past[number]
            x, (k, v) = layer.chunk(x, past)
            if chunks.encoder_back:
                own = (k[:, : k.shape[1] - chunks.ahead], v[:, : v.shape[1] - chunks.ahead])
                self.encoder_past[number] = _kept(past, own, chunks.encoder_back * chunks.size)
        result: Tensor = encoder.after_norm(x)
        return result

    def _find(self, encoded: Tensor, final: bool) -> Tensor:
        predictor, chunks = self.model.predictor, self.chunks
        if encoded.shape[1]:
            places = torch.arange(encoded.shape[1], device=encoded.device)
            counted = (places >= chunks.before) & (final | (places < chunks.before + chunks.size))
            alphas = predictor.weights(encoded) * counted
        else:  # nothing was ahead: the tail alone
            encoded = encoded.new_zeros(1, 1, encoded.shape[2])
            alphas = encoded.new_zeros(1, 1)
        fired = continuous_integrate_and_fire(
            encoded,
            alphas,
            threshold=predictor.threshold,
            tail=predictor.tail if final else None,
            state=self.fire_state,
            return_state=True,
        )
        self.fire_state = fired.state
        return fired.tokens

    def _write(self, tokens: Tensor, encoded: Tensor) -> Tensor:
        decoder, x = self.decoder, tokens
        keep = self.chunks.decoder_back * self.chunks.size
        for number, layer in enumerate(decoder.decoders):
            past, memory = self.decoder_past[number], self.memories[number]
            x, self.memories[number], seen = layer.chunk(x, encoded, memory, past)  # type: ignore[operator]
            self.decoder_past[number] = _kept(None, seen, keep) if keep else None
        return project(decoder.output_layer, decoder.finish(x))


class SampleStream:
    """Recognise samples as they come.

    Args:
        model, chunks: As `FeatureStream`.
        front_end: Makes rows of the samples.
    """

    def __init__(self, model: Paraformer, front_end: FrontEnd, chunks: Chunks | None = None) -> None:
        self.rows, self.features = front_end.stream(), FeatureStream(model, chunks)

    def push(self, samples: Tensor) -> list[int]:
        """Take more samples `[L]`; return the tokens of the chunks that they complete, often none.

        Raises:
            DataError: The samples are not one finite row, or the recording has ended.
        """
        return self.features.push(self.rows.push(samples))

    def finish(self) -> list[int]:
        """End the recording; return the tokens that are left."""
        if self.features.ended:
            return []
        return self.features.push(self.rows.finish()) + self.features.finish()


def _kept(past: Past | None, own: Past, most: int) -> Past:
    """The last `most` rows of what was kept and what is new."""
    joined = own if past is None else (torch.cat((past[0], own[0]), 1), torch.cat((past[1], own[1]), 1))
    cut = max(joined[0].shape[1] - most, 0)
    return joined[0][:, cut:], joined[1][:, cut:]
