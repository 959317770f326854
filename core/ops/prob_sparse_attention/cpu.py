"""ProbSparse attention on a CPU: one sample after the other, so that its products stay in the cache.

The chosen rows are taken from the products that chose them. Samples are shared between threads. README.md
derives the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.core import parallel

# Products of a sample that are made at once and kept until its rows are chosen (16 MiB); a sample of more
# goes strip by strip, and makes the chosen rows' products a second time.
_PRODUCTS = 1 << 22


def forward(
    q: Tensor, k: Tensor, v: Tensor, index_sample: Tensor | None, scale: float, causal: bool, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose, attend, fill the rest.

    Returns:
        The result; the chosen queries, `[B, H, u]`; their weights, `[B, H, u, Lk]`, float32.
    """
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=v.dtype)
    chosen = torch.empty(batch, heads, count, dtype=torch.int64)
    weights = torch.empty(batch, heads, count, k.shape[1])
    picks = None if index_sample is None else index_sample.t().contiguous()  # [U, Lq]

    def sample(b: int) -> None:
        queries, keys, values = (x[b].transpose(0, 1).float() for x in (q, k, v))  # [H, L, D]
        products = _products(queries, keys)
        if products is None:
            measures = [_measure(*strip, keys) for strip in _strips(queries, keys, picks)]
            best = torch.cat(measures, 1).topk(count, sorted=False).indices
            scores = torch.bmm(_rows(queries, best), keys.transpose(1, 2))
        else:
            best = stand_out(products, picks).topk(count, sorted=False).indices
            scores = _rows(products, best)
        scores.mul_(scale)
        if causal:
            scores.masked_fill_(torch.arange(k.shape[1]) > best[..., None], -torch.inf)
        torch.softmax(scores, -1, out=weights[b])
        rest = values.cumsum(1) if causal else values.mean(1, keepdim=True)
        out[b].transpose(0, 1).copy_(rest.expand(heads, length, -1))
        _put(out[b], best, torch.bmm(weights[b], values).to(v.dtype))
        chosen[b] = best

    _each(batch, sample)
    return out, chosen, weights


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    weights: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the result's gradient back to q, k and v; chosen and weights are from `forward`."""
    dq, dk, dv = (
        torch.zeros(q.shape, dtype=q.dtype),
        torch.empty(k.shape, dtype=k.dtype),
        torch.empty(v.shape, dtype=v.dtype),
    )

    def sample(b: int) -> None:
        queries, keys, values, grad = (x[b].transpose(0, 1).float() for x in (q, k, v, dy))
        best, p = chosen[b], weights[b]
        rows = _rows(grad, best)  # [H, u, D]
        pull = torch.bmm(rows, values.transpose(1, 2))
        pull = torch._softmax_backward_data(pull, p, -1, torch.float32).mul_(scale)  # [H, u, Lk]
        _put(dq[b], best, torch.bmm(pull, keys).to(q.dtype))
        dk[b].transpose(0, 1).copy_(torch.bmm(pull.transpose(1, 2), _rows(queries, best)))
        rest = grad.scatter(1, best[..., None].expand_as(rows), 0.0)
        rest = rest.flip(1).cumsum(1).flip(1) if causal else rest.sum(1, keepdim=True) / k.shape[1]
        dv[b].transpose(0, 1).copy_(torch.bmm(p.transpose(1, 2), rows).add_(rest))

    _each(len(q), sample)
    return dq, dk, dv


def _products(queries: Tensor, keys: Tensor) -> Tensor | None:
    if queries.shape[0] * queries.shape[1] * keys.shape[1] > _PRODUCTS:
        return None
    return torch.bmm(queries, keys.transpose(1, 2))


def _strips(queries: Tensor, keys: Tensor, picks: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Queries, and which keys they look at, few enough at a time."""
    rows = max(1, _PRODUCTS // (keys.shape[0] * keys.shape[1]))
    parts = [slice(i, i + rows) for i in range(0, queries.shape[1], rows)]
    return [(queries[:, part], None if picks is None else picks[:, part]) for part in parts]


def _measure(queries: Tensor, picks: Tensor | None, keys: Tensor) -> Tensor:
    return stand_out(torch.bmm(queries, keys.transpose(1, 2)), picks)


def stand_out(products: Tensor, picks: Tensor | None) -> Tensor:
    """Each query's largest sampled product less the sampled ones' sum over the number of keys, `[H, l]`."""
    keys = products.shape[2]
    if picks is None:
        return products.amax(2) - products.sum(2) / keys
    # Samples before queries: torch reduces the outer axis several times as fast as a short inner one.
    products = products.transpose(1, 2).gather(1, picks.expand(len(products), -1, -1))  # [H, U, l]
    return products.amax(1) - products.sum(1) / keys


def _rows(x: Tensor, best: Tensor) -> Tensor:
    """The chosen rows of `[H, L, n]`, `[H, u, n]`."""
    return x[torch.arange(len(x))[:, None], best]


def _put(x: Tensor, best: Tensor, rows: Tensor) -> None:
    """Write `[H, u, D]` to the chosen positions of `[L, H, D]`."""
    x[best, torch.arange(x.shape[1])[:, None]] = rows


def _each(batch: int, work: Callable[[int], None]) -> None:
    count = parallel.workers()

    def part(first: int) -> Callable[[], None]:
        def run() -> None:
            for b in range(first, batch, count):
                work(b)

        return run

    parallel.run([part(first) for first in range(count)])
