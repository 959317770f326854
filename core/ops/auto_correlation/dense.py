"""Auto-correlation by products of matrices, and, where series are long, by Fourier transforms alone.

Neither form computes a correlation of single channels, and neither copies the values once a lag. All of it is
plain torch, on any device; its own gradient is as cheap as one written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.ops.auto_correlation.reference import Mode, lags
from manyheads.core.ops.precision import wide

# Products of L x L matrices up to this length, Fourier transforms above it (README.md has the measurement).
PRODUCTS_UP_TO = 768


def auto_correlation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    mode: Mode = "batch",
    even_lags: bool = False,
) -> Tensor:
    """Compute the mean correlation and the weighted sum of shifts; arguments as the public function's."""
    length = q.shape[1]
    queries, keys, values = (wide(x[:, :length].flatten(2)) for x in (q, k, v))  # [B, S, C]
    short = length <= PRODUCTS_UP_TO
    mean = (_correlate if short else _correlate_by_spectrum)(queries, keys) / queries.shape[2]  # [B, L]
    if even_lags and length % 2:
        mean = torch.fft.irfft(torch.fft.rfft(mean), n=max(length - 1, 1))
    count = lags(factor, length, mean.shape[1])
    if mode == "batch":
        chosen = mean.mean(0).topk(count).indices.expand(mean.shape[0], count)
    else:
        chosen = mean.topk(count).indices
    weights = mean.gather(1, chosen).softmax(1)  # [B, lags]
    taps = mean.new_zeros(mean.shape[0], length).scatter(1, chosen, weights)  # [B, L]
    out = (_shift if short else _shift_by_spectrum)(taps, values)
    return out.to(v.dtype).view_as(q)


def _correlate(queries: Tensor, keys: Tensor) -> Tensor:
    """Add up the products of all positions along the diagonals, which go round the end: `[B, L]`."""
    batch, rows, length = *keys.shape[:2], queries.shape[1]
    products = torch.bmm(keys, queries.transpose(1, 2))  # [B, S, L]
    # In a line, one element more a row than there are makes the diagonals columns.
    line = torch.cat((products, products), 2).flatten(1)
    return F.pad(line, (0, rows)).view(batch, rows, 2 * length + 1)[:, :, :length].sum(1)


def _shift(taps: Tensor, values: Tensor) -> Tensor:
    """Multiply the values by the circulant matrix of the lags' weights."""
    length, rows = taps.shape[1], values.shape[1]
    back = taps.flip(1)
    # Row t, column j holds the weight of lag L - 1 - t - j; read backwards, of lag j - t.
    circulant = torch.cat((back, back[:, :-1]), 1).unfold(1, length, 1).flip(2)  # [B, L, L]
    return torch.bmm(circulant[:, :, :rows], values)


def _correlate_by_spectrum(queries: Tensor, keys: Tensor) -> Tensor:
    length = queries.shape[1]
    spectrum = torch.fft.rfft(keys, n=length, dim=1), torch.fft.rfft(queries, dim=1)
    return torch.fft.irfft(torch.linalg.vecdot(*spectrum), n=length, dim=1)


def _shift_by_spectrum(taps: Tensor, values: Tensor) -> Tensor:
    length = taps.shape[1]
    weights = torch.fft.rfft(taps, dim=1).conj()[:, :, None]
    return torch.fft.irfft(weights * torch.fft.rfft(values, n=length, dim=1), n=length, dim=1)
