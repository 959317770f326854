"""The attentions of the transformers library's Informer and Autoformer, with its parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.core.ops import attention, auto_correlation, prob_sparse_attention
from manyheads.timeseries.models.attention import FullAttention

COMPAT = ("none", "alone", "transformers")


@dataclass
class Draws:
    """Where sparse attentions take the keys from that they sample.

    Args:
        samples: The keys themselves, `[L]`, in the order of the calls.
        generator: Of the draws, where there are any; the default one if None.
    """

    samples: Iterator[Tensor] | None = None
    generator: torch.Generator | None = None

    def keys(self, length: int) -> Tensor:
        """Draw as many keys as there are, with replacement; on the CPU, unless the generator is elsewhere."""
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randint(0, length, (length,), generator=self.generator, device=device)


class LogSparseAttention(nn.Module):
    """Informer's attention as the transformers library has it: all queries share one draw of keys.

    So many keys are drawn as there are, with replacement. In evaluation every key is looked at once instead,
    so that forecasts repeat.

    Args:
        causal: Whether a step sees no later one; steps that do not attend take the sum of the values so far.
        factor: Times the logarithm of one more than the length: how many queries attend.
        dropout: Probability of dropping a weight.
        drawn: Whether keys are drawn in evaluation too.

    Shape:
        q, k, v `[B, L, H, D]` -> `[B, L, H, D]`.
    """

    def __init__(self, causal: bool, factor: int, dropout: float, drawn: bool) -> None:
        super().__init__()
        self.causal, self.factor, self.dropout, self.drawn = causal, factor, dropout, drawn

    def forward(self, q: Tensor, k: Tensor, v: Tensor, draws: Draws) -> Tensor:
        """Attend.

        Raises:
            ValueError: There are fewer samples than calls.
        """
        length = q.shape[1]
        count = min(self.factor * math.ceil(math.log1p(length)), length)
        keys = self._keys(length, draws)
        keys = None if keys is None else keys.to(q.device)
        p = self.dropout if self.training else 0.0
        if p:
            return self._with_dropout(q, k, v, keys, count, p)
        index = None if keys is None else keys.expand(length, -1)
        return prob_sparse_attention(
            q, k, v, self.factor, causal=self.causal, index_sample=index, sample=False, count=count
        )

    def _keys(self, length: int, draws: Draws) -> Tensor | None:
        if draws.samples is not None:
            sample = next(draws.samples, None)
            if sample is None:
                raise ValueError("index_samples has fewer entries than there are sparse attentions")
            return sample
        if self.training or self.drawn:
            return draws.keys(length)
        return None

    def _with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, count: int, p: float
    ) -> Tensor:
        """Attend with weights dropped, which the op has not: the chosen rows are dense attention."""
        with torch.no_grad():
            products = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, H, L, L]
            sampled = products if keys is None else products[..., keys]
            spread = sampled.amax(-1) - sampled.sum(-1) / k.shape[1]
            chosen = spread.topk(count, sorted=False).indices  # [B, H, u]
        rows = chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[3])  # [B, u, H, D]
        seen = None
        if self.causal:
            seen = torch.arange(k.shape[1], device=k.device) <= chosen[..., None]  # [B, H, u, L]
        rest = v.cumsum(1) if self.causal else v.mean(1, keepdim=True).expand_as(q)
        return rest.scatter(1, rows, attention(q.gather(1, rows), k, v, mask=seen, dropout_p=p))


class LaggedCorrelation(nn.Module):
    """Autoformer's attention, with or without what the transformers library does otherwise.

    Args:
        factor: Times the logarithm of the length: how many lags.
        compat: "none": as published. "alone": where queries are more than keys, only as many queries as
            there are too many are read, as the library does. "transformers": that, and each row of samples
            and heads takes lags and weights of another row's sample, so that a result depends on its batch.

    Shape:
        q `[B, Q, H, D]`, k and v `[B, K, H, D]` -> `[B, Q, H, D]`.
    """

    def __init__(self, factor: int, compat: str) -> None:
        super().__init__()
        self.factor, self.compat = factor, compat

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend."""
        surplus = q.shape[1] - k.shape[1]
        if self.compat != "none" and surplus > 0:
            q = F.pad(q[:, :surplus], (0, 0, 0, 0, 0, q.shape[1] - surplus))
        if self.compat == "transformers" and q.shape[0] > 1:
            return self._mixed(q, k, v)
        return auto_correlation(q, k, v, self.factor, mode="batch" if self.training else "sample")

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let row `b * H + h` take the weights, and in evaluation the lags, of sample `(b * H + h) % B`.

        Layouts and orders are the library's, so that the sums are, to the bit.
        """
        batch, length, heads = q.shape[:3]
        k, v = (F.pad(x[:, :length], (0, 0, 0, 0, 0, max(0, length - x.shape[1]))) for x in (k, v))
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * H, L, D]
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
        correlation = torch.fft.irfft(spectrum, n=length, dim=1)
        mean = correlation.unflatten(0, (batch, heads)).mean((1, -1))  # [B, L]
        count = min(int(self.factor * math.log(length)), length)
        if self.training:
            lags = mean.mean(0).topk(count).indices.expand(batch, count)
            best = mean.gather(1, lags)
        else:
            best, lags = mean.topk(count, dim=1)
        row = torch.arange(q.shape[0], device=q.device) % batch
        weights, lags = best.softmax(-1)[row], lags[row]  # [B * H, lags]
        steps = torch.arange(length, device=q.device)
        out = torch.zeros_like(v)
        for i in range(count):
            shifted = (steps + lags[:, i, None]) % length  # [B * H, L]
            out = out + v.gather(1, shifted[..., None].expand_as(v)) * weights[:, i, None, None]
        return out.unflatten(0, (batch, heads)).transpose(1, 2)


class Projected(nn.Module):
    """Projections to queries, keys and values, a way to attend, a projection back.

    Args:
        d_model: Width of a token.
        n_heads: Heads; divides d_model.
        attend: How to attend.

    Shape:
        x `[B, Q, d_model]`, context `[B, K, d_model]` -> `[B, Q, d_model]`.
    """

    def __init__(
        self, d_model: int, n_heads: int, attend: FullAttention | LogSparseAttention | LaggedCorrelation
    ) -> None:
        super().__init__()
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.q_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.n_heads, self.attend = n_heads, attend

    def forward(self, x: Tensor, context: Tensor, draws: Draws) -> Tensor:
        """Let x attend to the context."""
        projections = ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        q, k, v = (project(of).unflatten(-1, (self.n_heads, -1)) for project, of in projections)
        sparse = isinstance(self.attend, LogSparseAttention)
        return self.out_proj((self.attend(q, k, v, draws) if sparse else self.attend(q, k, v)).flatten(2))
