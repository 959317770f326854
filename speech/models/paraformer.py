"""Paraformer: speech recognition in one pass. Gao et al. 2022 (arXiv 2206.08317).

An encoder, a predictor that finds how many tokens there are and where, and a decoder that writes them all at
once. Parameters have the names and shapes of the published code.

Layout: B recordings, T rows of features, N tokens, D channels, V words.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.products import project
from manyheads.speech.models import paraformer_losses
from manyheads.speech.models.cif import CifPredictor, Predicted
from manyheads.speech.models.conformer import ConformerEncoder, Positions
from manyheads.speech.models.glancing import glance
from manyheads.speech.models.paraformer_losses import Objective
from manyheads.speech.models.paraformer_mwer import expected_errors
from manyheads.speech.models.sanm import SanmEncoder
from manyheads.speech.models.sanm_decoder import SanmDecoder
from manyheads.speech.models.transformer_decoder import TransformerDecoder
from manyheads.speech.tokens import BLANK, END, START

PARTS = 3  # of a row, in the predictor for timestamps


class Recognised(NamedTuple):
    """What is in the recordings.

    Attributes:
        logits: `[B, N, V]`; behind a row's count they mean nothing.
        counts: Tokens of each row, the end among them, `[B]`.
        encoded: The encoder's rows, `[B, T, D]`.
        alphas, fires: The predictor's, `[B, T + 1]`.
    """

    logits: Tensor
    counts: Tensor
    encoded: Tensor
    alphas: Tensor
    fires: Tensor


class CtcHead(nn.Module):
    """A linear map from encoded rows to words.

    Args:
        dim: Channels.
        vocab_size: Words, the blank first.

    Shape:
        x `[B, T, dim]`; the result `[B, T, vocab_size]`.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(dim, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return project(self.ctc_lo, x)


class Paraformer(nn.Module):
    """The recogniser; `paraformer` builds it from numbers.

    Args:
        encoder, predictor, decoder: Of one width.
        ctc: With a CTC head on the encoder.

    Shape:
        features `[B, T, input_size]`, of the front end; lengths `[B]`.
    """

    def __init__(
        self,
        encoder: SanmEncoder | ConformerEncoder,
        predictor: CifPredictor,
        decoder: SanmDecoder | TransformerDecoder,
        ctc: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.decoder = encoder, predictor, decoder
        self.ctc = CtcHead(encoder.dim, self.vocab_size) if ctc else None

    @property
    def vocab_size(self) -> int:
        """Words."""
        return self.decoder.output_layer.out_features

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, max_tokens: int | None = None
    ) -> Recognised:
        """Recognise padded recordings.

        Args:
            max_tokens: Size of the token axis, without a look at the predictor's counts (to export, or to
                spare a GPU the wait); tokens beyond it are dropped. None is the most of a row.
        """
        spans = None if lengths is None else self.encoder.spans(lengths)
        return self.decode(self.encoder(features, lengths), spans, max_tokens)

    def packed(self, features: Tensor, lengths: Tensor) -> Recognised:
        """Recognise recordings of unequal lengths without computing their padding; for evaluation."""
        encoded, lengths = self.encoder.packed(features, lengths), self.encoder.spans(lengths)
        found: Predicted = self.predictor(encoded, lengths)
        logits = self.decoder.packed(found.tokens, found.counts, encoded, lengths)
        return Recognised(logits, found.counts, encoded, found.alphas, found.fires)

    def decode(
        self, encoded: Tensor, lengths: Tensor | None = None, max_tokens: int | None = None
    ) -> Recognised:
        """Find and write the tokens of encoded recordings, of so many encoded rows."""
        found: Predicted = self.predictor(encoded, lengths, max_tokens=max_tokens)
        counts = found.counts if max_tokens is None else found.counts.clamp(max=max_tokens)
        logits = self.decoder(found.tokens, counts, encoded, lengths)
        return Recognised(logits, counts, encoded, found.alphas, found.fires)

    def losses(
        self,
        features: Tensor,
        lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        objective: Objective,
        order: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What training minimises, `loss`, and its parts; all but it are detached.

        Args:
            text: Tokens, without the end.
            objective: What is learnt.
            order: Of the glancing sampler, if it is not to be drawn; see `glance`.

        Shape:
            text `[B, U]`; text_lengths `[B]`; order `[B, U + 1]`; the results are numbers.

        Returns:
            loss, decoder, count; ctc, mwer and fine_count where they are learnt; accuracy, the share of
            tokens that the first pass has right.
        """
        targets = paraformer_losses.with_end(text, text_lengths, END)
        counts = text_lengths + 1
        encoded, lengths = self.encoder(features, lengths), self.encoder.spans(lengths)
        found: Predicted = self.predictor(encoded, lengths, targets=counts, max_tokens=targets.shape[1])
        tokens, guessed = found.tokens, None
        if objective.glancing > 0:
            tokens, guessed = self.show(tokens, targets, counts, encoded, lengths, objective.glancing, order)
        logits = self.decoder(tokens, counts, encoded, lengths)
        guessed = logits.argmax(-1) if guessed is None else guessed
        parts = {
            "decoder": paraformer_losses.smoothed_cross_entropy(
                logits, targets, objective.smoothing, objective.per_token
            ),
            "count": paraformer_losses.count_error(found.totals, counts, objective.per_token),
        }
        loss = (1 - objective.ctc) * parts["decoder"] + objective.count * parts["count"]
        if objective.ctc:
            if self.ctc is None:
                raise UsageError("objective: ctc needs a model built with its head (ctc=True)")
            parts["ctc"] = paraformer_losses.ctc(self.ctc(encoded), lengths, text, text_lengths)
            loss = loss + objective.ctc * parts["ctc"]
        if objective.mwer:
            parts["mwer"] = expected_errors(logits, targets, objective.candidates)
            loss = loss + objective.mwer * parts["mwer"]
        if self.predictor.parts:
            totals = self.predictor.fine_weights(encoded, lengths).sum(1)
            parts["fine_count"] = paraformer_losses.count_error(totals, counts, objective.per_token)
            loss = loss + objective.fine_count * objective.count * parts["fine_count"]
        right = (guessed == targets).sum() / counts.sum().clamp(min=1)
        return {"loss": loss, "accuracy": right} | {name: part.detach() for name, part in parts.items()}

    def show(
        self,
        tokens: Tensor,
        targets: Tensor,
        counts: Tensor,
        encoded: Tensor,
        lengths: Tensor,
        ratio: float,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put true tokens' vectors in the place of some, as `glance` chooses; and the first pass' tokens."""
        with torch.no_grad():
            guessed = self.decoder(tokens, counts, encoded, lengths).argmax(-1)
        shown = glance(guessed, targets, ratio, order)[..., None]
        true = self.decoder.embed(targets.clamp(min=0))
        return torch.where(shown, true, tokens), guessed


def greedy(logits: Tensor, counts: Tensor) -> list[list[int]]:
    """Each row's most likely tokens, without blank, start and end.

    Shape:
        logits `[B, N, V]`; counts `[B]`.
    """
    best = logits.argmax(-1)
    return [
        [token for token in row[:count] if token not in (BLANK, START, END)]
        for row, count in zip(best.tolist(), counts.tolist(), strict=True)
    ]


def paraformer(
    vocab_size: int,
    input_size: int = 560,
    dim: int = 512,
    heads: int = 4,
    units: int = 2048,
    encoder_blocks: int = 50,
    decoder_blocks: int = 16,
    width: int = 11,
    dropout: float = 0.1,
    predictor: Literal["full", "depthwise"] = "full",
    timestamps: bool = False,
    streaming: bool = False,
    ctc: bool = False,
    tail: float = 0.45,
) -> Paraformer:
    """Build a Paraformer.

    Args:
        vocab_size: Tokens of the list; blank, start and end come first.
        input_size: Channels of a row of features.
        dim, heads, units, width: Of all layers.
        encoder_blocks, decoder_blocks: How many.
        dropout: Of every part.
        predictor: "full", or "depthwise" (the first published form, without timestamps).
        timestamps: With the second predictor (BiCif).
        streaming: The decoder's memory is causal.
        ctc: With a CTC head.
        tail: Weight of a row of zeros behind each recording.

    Raises:
        UsageError: A size is not positive, heads do not divide dim, or options exclude one another.

    Example:
        >>> model = paraformer(100, dim=64, units=128, encoder_blocks=2, decoder_blocks=2)
        >>> model(torch.zeros(1, 20, 560)).logits.shape[2]
        100
    """
    if predictor not in ("full", "depthwise"):
        raise UsageError(f"paraformer: predictor must be 'full' or 'depthwise', not {predictor!r}")
    if timestamps and predictor == "depthwise":
        raise UsageError("paraformer: timestamps need predictor='full'")
    encoder = SanmEncoder(input_size, dim, heads, units, encoder_blocks, width, dropout)
    shift = width - 1 - (width - 1) // 2 if streaming else 0
    decoder = SanmDecoder(vocab_size, dim, heads, units, decoder_blocks, width, shift, dropout)
    parts = PARTS if timestamps else 0
    cif = CifPredictor(
        dim, depthwise=predictor == "depthwise", dropout=dropout, tail=tail, parts=parts
    )  # fmt: skip
    return Paraformer(encoder, cif, decoder, ctc)


def paraformer_large(
    vocab_size: int = 8404, timestamps: bool = False, streaming: bool = False, dropout: float = 0.1
) -> Paraformer:
    """Build the published large model: 220.08 M parameters with 8404 tokens.

    Args:
        vocab_size: Tokens of the list; the English model has 10020.
        timestamps: With the second predictor (BiCif).
        streaming: The decoder's memory is causal, as the online model has it.
        dropout: Of every part.
    """
    return paraformer(vocab_size, timestamps=timestamps, streaming=streaming, dropout=dropout)


def paraformer_conformer(
    vocab_size: int,
    input_size: int = 80,
    dim: int = 256,
    heads: int = 4,
    units: int = 2048,
    encoder_blocks: int = 12,
    decoder_blocks: int = 6,
    width: int = 15,
    dropout: float = 0.1,
    positions: Positions = "legacy",
    ctc: bool = True,
    tail: float = 0.45,
) -> Paraformer:
    """Build the Paraformer of the AISHELL recipe, with a Conformer for an encoder; its rows are of 40 ms.

    Args:
        vocab_size: Tokens of the list; blank, start and end come first.
        input_size: Channels of a frame of features, which the front end does not stack (stack 1, stride 1).
        dim, heads, units: Of all layers.
        encoder_blocks, decoder_blocks: How many.
        width: Rows that a filter of the encoder spans; odd.
        dropout: Of every part.
        positions: "legacy" as in the recipe, whose published weights need it; "relative" as in the paper.
        ctc: With a CTC head, as in the recipe, where its loss weighs 0.3.
        tail: Weight of a row of zeros behind each recording.

    Raises:
        UsageError: A size is not positive or does not fit the others.

    Example:
        >>> model = paraformer_conformer(100, dim=64, units=128, encoder_blocks=2, decoder_blocks=2)
        >>> model(torch.zeros(1, 100, 80)).encoded.shape
        torch.Size([1, 24, 64])
    """
    encoder = ConformerEncoder(input_size, dim, heads, units, encoder_blocks, width, dropout, positions)
    decoder = TransformerDecoder(vocab_size, dim, heads, units, decoder_blocks, dropout)
    predictor = CifPredictor(dim, depthwise=True, dropout=dropout, tail=tail)
    return Paraformer(encoder, predictor, decoder, ctc)
