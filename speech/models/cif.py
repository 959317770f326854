"""Paraformer's predictor: how much of a token each encoded row holds, and the tokens' vectors.

Sources: Gao et al. 2022 (arXiv 2206.08317); Dong and Xu 2020 (arXiv 1905.11235); the second predictor, three
times finer, for timestamps: Shi et al. 2023 (arXiv 2301.12343). Names and shapes of the published code.

The published code lets padding into a batch's shorter recordings (its convolution, its tail and its LSTM read
what lies behind their ends). Here a batch's rows are those of its recordings one by one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.errors import UsageError
from manyheads.core.ops import continuous_integrate_and_fire
from manyheads.speech.models.sanm import Rows

LEAST = 1e-9  # a sum of weights below this is silence: no scale makes tokens of it


class Predicted(NamedTuple):
    """What the predictor finds.

    Attributes:
        tokens: A vector each, `[B, N, D]`, zeros behind a row's count.
        counts: Tokens of each row, `[B]`.
        alphas: The rows' weights as they were added up, `[B, T]`, or `[B, T + 1]` with the tail.
        fires: The running sums, of the same shape: one or more where a token ends.
        totals: Sum of each row's weights, `[B]`; without the tail, before scaling. Learns the counts.
    """

    tokens: Tensor
    counts: Tensor
    alphas: Tensor
    fires: Tensor
    totals: Tensor


class CifPredictor(nn.Module):
    """A convolution, a weight for each row, integrate-and-fire.

    Args:
        dim: Channels.
        left, right: Rows of context.
        depthwise: A filter a channel with a residual (the first published form), not a full convolution.
        dropout: Of the depthwise form.
        threshold: Weight of a token.
        smooth, noise: A weight is relu(sigmoid(.) * smooth - noise).
        tail: Weight of one more row, of zeros, behind each recording, outside training.
        parts: Into how many parts a second predictor cuts a row, for timestamps (BiCif: 3); 0 for none.
        smooth2, noise2: Of the second's weights.

    Shape:
        hidden `[B, T, dim]`; lengths `[B]`; targets `[B]`.

    Raises:
        UsageError: The tail or parts are negative, or the threshold is not positive.
    """

    def __init__(
        self,
        dim: int,
        left: int = 1,
        right: int = 1,
        *,
        depthwise: bool = False,
        dropout: float = 0.1,
        threshold: float = 1.0,
        smooth: float = 1.0,
        noise: float = 0.0,
        tail: float = 0.45,
        parts: int = 0,
        smooth2: float = 0.25,
        noise2: float = 0.01,
    ) -> None:
        super().__init__()
        if tail < 0 or parts < 0 or threshold <= 0:
            raise UsageError(
                f"CIF: tail ({tail}) and parts ({parts}) must be 0 or more, threshold ({threshold}) more"
            )
        self.left, self.right, self.depthwise, self.dropout = left, right, depthwise, dropout
        self.threshold, self.smooth, self.noise, self.tail = threshold, smooth, noise, tail
        self.cif_conv1d = nn.Conv1d(dim, dim, left + right + 1, groups=dim if depthwise else 1)
        self.cif_output = nn.Linear(dim, 1)
        self.parts, self.smooth2, self.noise2 = parts, smooth2, noise2
        if parts:
            self.upsample_cnn = nn.ConvTranspose1d(dim, dim, parts, parts)
            self.blstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
            self.cif_output2 = nn.Linear(2 * dim, 1)

    def weights(self, hidden: Tensor) -> Tensor:
        """Weigh every row, `[B, T]`; never in half precision under autocast, whose sums would miss tokens."""
        with full_precision(hidden):
            turned = hidden.to(self.cif_conv1d.weight.dtype).transpose(1, 2)
            seen = self.cif_conv1d(F.pad(turned, (self.left, self.right)))
            if self.depthwise:
                seen = F.dropout(seen + turned, self.dropout, self.training)
            chance = self.cif_output(seen.relu().transpose(1, 2))[..., 0].sigmoid()
            return (chance * self.smooth - self.noise).relu()

    def forward(
        self,
        hidden: Tensor,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        max_tokens: int | None = None,
    ) -> Predicted:
        """Find the tokens: as many as `targets` says (training), or as the weights and the tail fire.

        Args:
            max_tokens: Size of the token axis, without a look at the weights; None is the most of a row.
        """
        batch, size, _ = hidden.shape
        lengths = torch.full((batch,), size, device=hidden.device) if lengths is None else lengths
        hidden = clear(hidden, lengths)
        inside = torch.arange(size, device=hidden.device) < lengths[:, None]
        alphas = self.weights(hidden) * inside
        totals = alphas.sum(1)
        if targets is not None:
            alphas = alphas * (targets.to(alphas.dtype) / totals.clamp(min=LEAST))[:, None]
        elif self.tail > 0:
            behind = torch.arange(size + 1, device=hidden.device) == lengths[:, None]
            alphas = F.pad(alphas, (0, 1)) + self.tail * behind
            hidden, lengths = F.pad(hidden, (0, 0, 0, 1)), lengths + 1
        fired = continuous_integrate_and_fire(
            hidden, alphas, threshold=self.threshold, lengths=lengths, max_tokens=max_tokens
        )
        return Predicted(fired.tokens, fired.counts, alphas, fired.fires, totals)

    def fine_weights(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Weigh the parts of every row, `[B, parts * T]`; their sums learn the counts, too.

        Raises:
            UsageError: There is no second predictor.
        """
        if not self.parts:
            raise UsageError("CIF: built without the second predictor that timestamps need (parts=3)")
        hidden = clear(hidden, lengths)
        with full_precision(hidden):
            turned = hidden.to(self.cif_conv1d.weight.dtype).transpose(1, 2)
            cut = self.upsample_cnn(turned).transpose(1, 2)
            context = run_lstm(self.blstm, cut, lengths * self.parts)
            chance = self.cif_output2(context)[..., 0].sigmoid()
        inside = torch.arange(cut.shape[1], device=hidden.device) < (lengths * self.parts)[:, None]
        return (chance * self.smooth2 - self.noise2).relu() * inside

    def places(self, hidden: Tensor, lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The fine weights, scaled to the number of tokens, and their running sums, for `timestamps`."""
        alphas = self.fine_weights(hidden, lengths)
        alphas = alphas * (counts.to(alphas.dtype) / alphas.sum(1).clamp(min=LEAST))[:, None]
        return alphas, peaks(alphas, self.threshold - 1e-4)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off where x is; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def clear(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Zeros behind each recording's end."""
    return Rows.padded(lengths, hidden.shape[1]).clear(hidden)


def run_lstm(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    """Run a bidirectional LSTM over each recording alone: backwards from its own end, not from padding."""
    packed = nn.utils.rnn.pack_padded_sequence(
        x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
    )
    out, _ = lstm(packed)
    result: Tensor = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
    return result


def peaks(alphas: Tensor, threshold: float) -> Tensor:
    """Running sums that lose a threshold where they reach it, once a step at most: what timestamps read.

    Not differentiable; in the dtype of the weights, in their order, so that times are the published ones.

    Shape:
        alphas and the result `[B, T]`.
    """
    weights = alphas.detach().cpu().numpy()
    found = np.empty_like(weights)
    total = np.zeros(len(weights), weights.dtype)
    limit = weights.dtype.type(threshold)
    for step in range(weights.shape[1]):
        total = total + weights[:, step]
        found[:, step] = total
        total = np.where(total >= limit, total - limit, total)
    return torch.from_numpy(found).to(alphas.device)
