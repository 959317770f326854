"""What happens inside a chunk, in torch: decays between its steps, and faded queries and keys.

With a vector decay, scores go step by step, with all earlier keys faded by one more step each time: no
difference of summed-up logarithms, no exponential of a long span (README.md).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A weight below this is taken for zero: subnormal numbers cost a processor a hundred times a normal one.
_TINY = 1e-37
# exp of less is zero, and so are sums of it that float64 holds exactly.
_LEAST = -1e4


def weights(exponent: Tensor) -> Tensor:
    """The exponentials, float32."""
    return torch.threshold_(exponent.to(torch.float32, copy=True).exp_(), _TINY, 0.0)


def sums(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of log-decays `[N, c, ...]` along each chunk, and the whole sum `[N, 1, ...]`.

    The sums are float64: the difference of two float32 sums would carry the rounding of both.
    """
    total = log_decay.double().clamp(min=_LEAST).cumsum(1)
    return total, total[:, -1:]


def backwards(x: Tensor) -> Tensor:
    """Running sums from a chunk's end, `[N, c, ...]`."""
    return x.flip(1).cumsum(1).flip(1)


class Inputs(NamedTuple):
    """Queries, keys and log-decays of all chunks, each float32 `[N, c, H, K]` and contiguous."""

    q: Tensor
    k: Tensor
    log_decay: Tensor


class Faded(NamedTuple):
    """Queries and keys with their decay.

    Attributes:
        scores: Of each chunk's own pairs, zero where they do not see each other, `[H, N, c, c]`.
        q: Queries, scaled, faded from the chunk's beginning to their step, `[H, N, c, K]`.
        k: Keys faded from their step to the chunk's end, `[H, N, c, K]`.
        whole: What is left after the chunk of the state before it, `[H, N, K, 1]`.
    """

    scores: Tensor
    q: Tensor
    k: Tensor
    whole: Tensor


class Pulls(NamedTuple):
    """Gradients of what `Fading.fade` computes, of some chunks of one head.

    Attributes:
        scores: Of the scores, whatever stands where they are zero, `[m, c, c]`.
        q: Of the faded queries, `[m, c, K]`.
        k: Of the faded keys, `[m, c, K]`.
        whole: Of the logarithm of `whole`, `[m, K]`.
    """

    scores: Tensor
    q: Tensor
    k: Tensor
    whole: Tensor


class Fading(Protocol):
    """The computations inside a chunk, in torch here and compiled in `numba.py`."""

    def remaining(self, total: Tensor, group: int, at: slice, backwards: bool) -> Tensor:
        """What is left at step i of step j's product where the decay is scalar; zero where i comes first.

        Args:
            total: Sums of log-decays from the chunk's beginning, float64.
            backwards: Count i from the chunk's end.

        Shape:
            total `[N, c, G, h]`; the result `[m, h, c, c]`, of the chunks `at` of a group.
        """

    def fade(self, given: Inputs, found: Faded, head: int, at: slice, scale: float) -> None:
        """Fade queries and keys of the chunks `at` of a head."""

    def pull(self, given: Inputs, pulls: Pulls, found: Inputs, head: int, at: slice, scale: float) -> None:
        """From the gradients of what `fade` computed to those of the inputs, in `found`."""


class TorchFading:
    """`Fading` in torch; with a vector decay a loop over the steps of all chunks at once."""

    def remaining(self, total: Tensor, group: int, at: slice, backwards: bool) -> Tensor:
        """See `Fading`."""
        sums = total[at, :, group].transpose(1, 2)  # [m, h, c]
        found = weights(sums[..., :, None] - sums[..., None, :]).tril_()
        return found.flip(-2) if backwards else found

    def fade(self, given: Inputs, found: Faded, head: int, at: slice, scale: float) -> None:
        """See `Fading`."""
        q, k, log_decay = (x[at, :, head] for x in given)
        decay, prefix, suffix, whole = _products(log_decay)
        size = q.shape[1]
        query, keys, scores = q * scale, k.clone(), found.scores[head, at].zero_()
        for i in range(size):
            _fade(keys[:, :i], decay[:, i : i + 1])
            scores[:, i, : i + 1] = (keys[:, : i + 1] @ query[:, i, :, None])[..., 0]
        torch.mul(query, prefix, out=found.q[head, at])
        torch.mul(k, suffix, out=found.k[head, at])
        found.whole[head, at, :, 0] = whole

    def pull(self, given: Inputs, pulls: Pulls, found: Inputs, head: int, at: slice, scale: float) -> None:
        """See `Fading`."""
        q, k, log_decay = (x[at, :, head] for x in given)
        decay, prefix, suffix, _ = _products(log_decay)
        size, scores = q.shape[1], pulls.scores
        query, keys = q * scale, k.clone()
        queries = query.clone()
        dq, dk = torch.empty_like(query), torch.empty_like(keys)  # of the pairs of two different steps
        for i in range(size):
            _fade(keys[:, :i], decay[:, i : i + 1])
            dq[:, i] = (scores[:, i : i + 1, :i] @ keys[:, :i])[:, 0]
        for j in range(size)[::-1]:
            dk[:, j] = (scores[:, j + 1 :, j][:, None] @ queries[:, j + 1 :])[:, 0]
            _fade(queries[:, j:], decay[:, j : j + 1])
        own = scores.diagonal(dim1=1, dim2=2)[..., None]
        read, kept = pulls.q * prefix, pulls.k * suffix
        ends = (query * (dq + read)).double() - (k * dk).double()
        ahead = (k * kept).double()
        decays = backwards(ends) + ahead.cumsum(1) - ahead + pulls.whole[:, None]
        found.q[at, :, head] = (dq + read + own * k) * scale
        found.k[at, :, head] = dk + kept + own * query
        found.log_decay[at, :, head] = decays.float()


def _products(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays, their products up to each step, after each step, and over the chunk."""
    total, whole = sums(log_decay)
    return weights(log_decay), weights(total), weights(whole - total), weights(whole)[:, 0]


def _fade(x: Tensor, decay: Tensor) -> None:
    x.mul_(decay)
    x.masked_fill_(x.abs() < _TINY, 0.0)
