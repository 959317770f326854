"""The attention layers of Informer and Autoformer: four projections around one of three ways to attend.

The parameters have the names of this family's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops import attention, auto_correlation, prob_sparse_attention
from manyheads.core.ops.auto_correlation.reference import Mode
from manyheads.core.ops.dropout import dropout
from manyheads.core.ops.prob_sparse_attention import draw_keys
from manyheads.timeseries.models.blocks import Pointwise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


@dataclass
class Probe:
    """What a caller puts into the attention layers of a forward pass, and takes out of them.

    Args:
        samples: The keys that each sparse attention samples, `[Q, U]`, in the order of the calls.
        maps: Gets the weights of each attention, `[B, H, Q, K]`.
    """

    samples: Iterator[Tensor] | None = None
    maps: list[Tensor] | None = None


class FullAttention(nn.Module):
    """Dense softmax attention.

    Args:
        causal: Whether a step sees no later one.
        dropout: Probability of dropping a weight.

    Shape:
        q `[B, Q, H, D]`, k and v `[B, K, H, D]` -> `[B, Q, H, D]`.
    """

    def __init__(self, causal: bool, dropout: float) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, probe: Probe | None = None) -> Tensor:
        """Attend."""
        if probe is not None and probe.maps is not None:
            probe.maps.append(self._weights(q, k))
        return attention(q, k, v, causal=self.causal, dropout_p=self.dropout if self.training else 0.0)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores.softmax(-1)


class ProbSparseAttention(nn.Module):
    """Informer's attention: the queries that stand out attend, the others take the mean of the values.

    Which queries stand out is judged on sampled keys. In training the sample is new each time; in evaluation
    it depends on the lengths alone, so that forecasts repeat (the official code draws anew there, too).

    Args:
        causal: Whether a step sees no later one; the others then take the sum of the values so far.
        factor: Times the logarithm of the length: how many keys are sampled and how many queries attend.
        batch_union: Whether all samples of a batch take the queries that stand out in any; see `informer`.

    Shape:
        q `[B, Q, H, D]`, k and v `[B, K, H, D]` -> `[B, Q, H, D]`.

    Source:
        arXiv 2012.07436, section 3.
    """

    def __init__(self, causal: bool, factor: int, batch_union: bool = False) -> None:
        super().__init__()
        self.causal, self.factor, self.batch_union = causal, factor, batch_union

    def forward(self, q: Tensor, k: Tensor, v: Tensor, probe: Probe | None = None) -> Tensor:
        """Attend.

        Raises:
            ValueError: The probe has fewer samples than there are calls.
        """
        if probe is not None and probe.samples is not None:
            sample = next(probe.samples, None)
            if sample is None:
                raise ValueError("index_samples has fewer entries than there are sparse attentions")
        elif self.training:
            sample = draw_keys(q.shape[1], k.shape[1], self.factor)
        else:
            sample = fixed_keys(q.shape[1], k.shape[1], self.factor, q.device)
        if probe is not None and probe.maps is not None:
            probe.maps.append(self._weights(q, k, sample))
        return self._attend(q, k, v, sample)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sample: Tensor) -> Tensor:
        return prob_sparse_attention(
            q, k, v, self.factor, causal=self.causal, index_sample=sample, union=self.batch_union
        )

    def _weights(self, q: Tensor, k: Tensor, sample: Tensor) -> Tensor:
        """Attend to unit vectors instead of values: what comes out of them are the weights."""
        width, keys = k.shape[-1], k.shape[1]
        units = F.pad(torch.eye(keys, device=k.device, dtype=k.dtype), (0, -keys % width))
        parts = [self._attend(q, k, some[:, None].expand_as(k), sample) for some in units.split(width, dim=1)]
        return torch.cat(parts, dim=-1)[..., :keys].transpose(1, 2)  # [B, H, Q, K]


def fixed_keys(queries: int, keys: int, factor: int, device: torch.device) -> Tensor:
    """Scatter keys over queries, always in the same way: as many for each as `draw_keys` draws.

    A hash of the position, not a generator: those differ between devices, and cannot be exported.

    Shape:
        `[queries, U]`, int64.
    """
    count = max(1, min(factor * math.ceil(math.log(keys)), keys))
    x = torch.arange(queries * count, device=device)
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):  # on 32 bits
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFF
    return (x % keys).view(queries, count)


class AutoCorrelation(nn.Module):
    """Autoformer's attention: the values, delayed by the lags at which queries and keys agree best.

    In training all samples of a batch share their lags, in evaluation each has its own: so the official code.

    Args:
        factor: Times the logarithm of the length: how many lags.
        even_lags: Whether an odd length loses a lag; see `autoformer`.

    Shape:
        q `[B, Q, H, D]`, k and v `[B, K, H, D]` -> `[B, Q, H, D]`.

    Source:
        arXiv 2106.13008, section 3.2.
    """

    def __init__(self, factor: int, even_lags: bool) -> None:
        super().__init__()
        self.factor, self.even_lags = factor, even_lags

    def forward(self, q: Tensor, k: Tensor, v: Tensor, probe: Probe | None = None) -> Tensor:
        """Attend; there is nothing to probe."""
        mode: Mode = "batch" if self.training else "sample"
        return auto_correlation(q, k, v, self.factor, mode=mode, even_lags=self.even_lags)


class AttentionLayer(nn.Module):
    """Projections to queries, keys and values of several heads, a way to attend, a projection back.

    Args:
        d_model: Width of a token.
        n_heads: Heads; divides d_model.
        attend: How to attend.
        interleave: Whether the result is read head by head instead of step by step, which mixes the two: what
            the official code means to do in its decoder, and copies of it do everywhere.

    Shape:
        x `[B, Q, d_model]`, context `[B, K, d_model]` -> `[B, Q, d_model]`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        attend: FullAttention | ProbSparseAttention | AutoCorrelation,
        interleave: bool = False,
    ) -> None:
        super().__init__()
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)
        self.n_heads, self.attend, self.interleave = n_heads, attend, interleave

    def forward(
        self, x: Tensor, context: Tensor, last: int | None = None, probe: Probe | None = None
    ) -> Tensor:
        """Let x attend to the context; give the `last` steps only, if that is given."""
        heads = (self.n_heads, -1)
        q = self.query_projection(x).unflatten(-1, heads)  # [B, Q, H, D]
        k = self.key_projection(context).unflatten(-1, heads)  # [B, K, H, D]
        v = self.value_projection(context).unflatten(-1, heads)
        out = self.attend(q, k, v, probe)
        out = (out.transpose(1, 2) if self.interleave else out).reshape(x.shape)
        return self.out_projection(out if last is None else out[:, -last:])


def feed_forward(
    x: Tensor, conv1: Pointwise, conv2: Pointwise, activation: Callable[[Tensor], Tensor], p: float
) -> Tensor:
    """Map each step by two layers, with dropout after each.

    Shape:
        `[B, L, d_model]` -> `[B, L, d_model]`.
    """
    return dropout(conv2(dropout(activation(conv1(x)), p)), p)
