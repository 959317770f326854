"""Attention in which only the queries that stand out against a sample of keys attend at all.

README.md beside this file says why the products are computed densely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.prob_sparse_attention import custom_op, dense, reference
from manyheads.core.ops.prob_sparse_attention.reference import share

__all__ = ["draw_keys", "prob_sparse_attention"]

OP = "prob_sparse_attention"


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    causal: bool = False,
    scale: float | None = None,
    index_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample: bool = True,
    count: int | None = None,
    union: bool = False,
) -> Tensor:
    """Let the queries attend whose products with sampled keys have the largest maximum above the mean.

    A query's measure is the maximum of its unscaled products with the keys sampled for it, less their sum
    divided by the number of all keys. The `count` queries with the largest attend to all keys; every other
    position gets the mean of v, or, where causal, the sum of v up to and with itself.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        factor: Of the numbers of sampled keys and of attending queries, `factor * ceil(ln L)` each.
        causal: An attending query sees keys up to its own position; needs Lq = Lk.
        scale: Of the attending queries' products; None means `1 / sqrt(D)`. The measure has none.
        index_sample: The keys that each query's measure looks at, for all samples and heads; one that comes
            twice counts twice. None draws `draw_keys(...)`, anew in each call.
        generator, sample: Of that draw, on the CPU. sample=False looks at every key once and draws nothing.
        count: How many queries attend; None is `min(factor * ceil(ln Lq), Lq)`.
        union: With one head: in each sample the queries chosen in any sample of the batch attend, as the
            Time-Series-Library has it by accident; one that is chosen n times has n times its gradient.

    Shape:
        q `[B, Lq, H, D]`; k, v `[B, Lk, H, D]`; index_sample `[Lq, U]`, int64; the result `[B, Lq, H, D]`.

    Raises:
        TypeError: q, k, v are not of one floating dtype, or index_sample is not int64.
        ValueError: A shape or a number does not fit; causal with Lq != Lk; union with several heads.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Zhou et al. 2021, Informer (arXiv 2012.07436).

    Example:
        >>> y = prob_sparse_attention(q, k, v, 5, generator=torch.Generator().manual_seed(0))
    """
    _check(q, k, v, factor, index_sample, count)
    _check_kind(q, k, causal, union)
    if sample and index_sample is None:
        index_sample = draw_keys(q.shape[1], k.shape[1], factor, generator=generator)
    index_sample = None if index_sample is None else index_sample.to(q.device)
    backend = choose(OP, device=q.device.type, dtype=q.dtype, union=union).backend
    if backend in ("numba", "cpu"):
        chosen = share(factor, q.shape[1]) if count is None else count
        return _explicit(q, k, v, index_sample, scale, causal, chosen, backend)
    run = reference.prob_sparse_attention if backend == "reference" else dense.prob_sparse_attention
    options = {"causal": causal, "scale": scale, "sample": sample, "count": count, "union": union}
    return run(q, k, v, factor, index_sample=index_sample, **options)  # type: ignore[arg-type]


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_sample: Tensor | None,
    scale: float | None,
    causal: bool,
    chosen: int,
    backend: str,
) -> Tensor:
    """Run a path that has a backward of its own; without gradients, without the op around it."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    whole = learns or torch.compiler.is_compiling()
    op = custom_op.prob_sparse_attention_op if whole else custom_op.forward
    return op(q, k, v, index_sample, scale, causal, chosen, backend)[0]


def _check_kind(q: Tensor, k: Tensor, causal: bool, union: bool) -> None:
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"{OP}: causal needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}")
    if union and q.shape[2] != 1:
        raise ValueError(f"{OP}: union is of one head, and q has {q.shape[2]}")


def draw_keys(queries: int, keys: int, factor: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw `min(factor * ceil(ln keys), keys)` keys for each query, with replacement, on the CPU.

    The draw is the published code's: with the same seed it gives the same keys.

    Returns:
        `[queries, U]`, int64, U at least 1.
    """
    return torch.randint(keys, (queries, max(1, share(factor, keys))), generator=generator)


def _check(
    q: Tensor, k: Tensor, v: Tensor, factor: float, index_sample: Tensor | None, count: int | None
) -> None:
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"{OP}: q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise ValueError(f"{OP}: q must be [B, Lq, H, D], Lq, H and D > 0, not {tuple(q.shape)}")
    if k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or k.shape[1] == 0:
        wanted = f"[{q.shape[0]}, Lk, {q.shape[2]}, {q.shape[3]}] with Lk > 0"
        raise ValueError(f"{OP}: k must be {wanted}, not {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v must have k's shape {tuple(k.shape)}, not {tuple(v.shape)}")
    if not factor > 0:
        raise ValueError(f"{OP}: factor must be positive, not {factor}")
    if count is not None and not 0 <= count <= q.shape[1]:
        raise ValueError(f"{OP}: count must be in 0..{q.shape[1]}, not {count}")
    if index_sample is None:
        return
    if index_sample.dtype != torch.int64:
        raise TypeError(f"{OP}: index_sample must be int64, not {index_sample.dtype}")
    if index_sample.ndim != 2 or index_sample.shape[0] != q.shape[1] or index_sample.shape[1] == 0:
        raise ValueError(
            f"{OP}: index_sample must be [{q.shape[1]}, U] with U > 0, not {tuple(index_sample.shape)}"
        )
