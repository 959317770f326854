"""ProbSparse attention by the dense products, from which the sampled ones are picked.

Plain torch on any device. The choice of queries has no gradient, so its products are made without one, a few
matrices at a time; only the chosen rows are attention that autograd sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.core import parallel
from manyheads.core.ops.attention import attention
from manyheads.core.ops.attention.reference import attention as plain_attention
from manyheads.core.ops.prob_sparse_attention.reference import share

# Products at a time: on a CPU they stay in the cache, elsewhere they bound the memory.
_CPU_PRODUCTS = 1 << 20
_PRODUCTS = 1 << 27


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    causal: bool,
    scale: float | None,
    index_sample: Tensor | None,
    sample: bool,
    count: int | None,
    union: bool,
) -> Tensor:
    """Choose, attend, fill the rest; arguments as the public function's."""
    count = share(factor, q.shape[1]) if count is None else count
    rest = _cumulative(v) if causal else v.mean(1, keepdim=True).expand_as(q)
    with torch.no_grad():
        chosen = measure(q, k, index_sample).topk(count, sorted=False).indices  # [B, H, u]
    if union:
        chosen = chosen.flatten().expand(q.shape[0], 1, -1)
    index = chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[3])  # [B, u, H, D]
    mask = None
    if causal:
        mask = torch.arange(k.shape[1], device=k.device) <= chosen[..., None]  # [B, H, u, Lk]
    # torch's fused CPU attention breaks the float64 rule in its gradients, and saves nothing on so few rows.
    attend = plain_attention if q.device.type == "cpu" or count == 0 else attention
    rows = attend(q.gather(1, index), k, v, mask=mask, scale=scale)
    return rest.scatter(1, index, rows)


def _cumulative(v: Tensor) -> Tensor:
    return v.cumsum(1) if v.dtype == torch.float64 else v.float().cumsum(1).to(v.dtype)


def measure(q: Tensor, k: Tensor, index_sample: Tensor | None) -> Tensor:
    """How far each query's largest sampled product stands above their mean; None samples every key.

    Shape:
        q `[B, Lq, H, D]`; k `[B, Lk, H, D]`; index_sample `[Lq, U]`; the result `[B, H, Lq]`, float32.
    """
    batch, length, heads, _ = q.shape
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        samples = max(1, _PRODUCTS // (heads * length * k.shape[1]))
        if torch.compiler.is_compiling() or samples >= batch:  # a loop would be traced turn by turn
            return _measure(q, k, index_sample)
        parts = zip(q.split(samples), k.split(samples), strict=True)
        return torch.cat([_measure(*part, index_sample) for part in parts])
    out = torch.empty(batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))
    count = parallel.workers()
    rows = max(1, min(length, _CPU_PRODUCTS // (heads * k.shape[1])))

    def part(first: int) -> Callable[[], None]:
        def run() -> None:
            for i in range(first, batch, count):
                for j in range(0, length, rows):
                    strip = slice(j, j + rows)
                    picks = None if index_sample is None else index_sample[strip]
                    out[i, :, strip] = _measure(q[i : i + 1, strip], k[i : i + 1], picks)[0]

        return run

    parallel.run([part(first) for first in range(count)])
    return out


def _measure(q: Tensor, k: Tensor, index_sample: Tensor | None) -> Tensor:
    products = torch.matmul(_wide(q).transpose(1, 2), _wide(k).permute(0, 2, 3, 1))  # [B, H, Lq, Lk]
    if index_sample is not None:
        products = products.gather(3, index_sample.expand(*products.shape[:2], -1, -1))
    return products.amax(-1) - products.sum(-1) / k.shape[1]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
