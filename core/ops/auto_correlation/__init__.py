"""Attention by lags: a series is averaged over its own shifts, weighted by how q and k correlate there.

The two fast forms are derived in README.md beside this file.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.auto_correlation import dense, reference
from manyheads.core.ops.auto_correlation.reference import MODES, Mode

__all__ = ["auto_correlation"]


def auto_correlation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: float,
    *,
    mode: Mode = "batch",
    even_lags: bool = False,
) -> Tensor:
    """Sum v over its `int(factor * ln L)` most correlated circular shifts, weighted by a softmax over them.

    The correlation at lag t is `sum_s q[s + t] k[s]`, unscaled, averaged over heads and channels; its shift
    of the values is `v[s + t]`. Positions count modulo L.

    Args:
        q: Queries.
        k: Keys; cut to the queries' length, or filled up with zeros.
        v: Values, cut or filled up as the keys.
        factor: Of the number of lags (at most all of them; none below L = e^(1 / factor), which gives zeros).
        mode: Who chooses the lags: "batch", one choice by the batch's mean correlation (the paper's
            training); "sample", each sample (its evaluation); "channel", each head and channel, with weights
            of its own. Results of a sample depend on the others in "batch" only.
        even_lags: Read the correlation's spectrum as that of `2 * (L // 2)` samples, as the
            Time-Series-Library has it: another correlation, with L - 1 lags, where L is odd.

    Shape:
        q `[B, L, H, E]`; k, v `[B, S, H, E]`; the result `[B, L, H, E]`.

    Returns:
        The sum, in v's dtype; correlation, softmax and sum are float32 (float64 for float64 inputs).

    Raises:
        TypeError: q, k, v are not of one floating dtype.
        ValueError: A shape or `mode` is wrong, or `factor` is not positive.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Wu et al. 2021, Autoformer (arXiv 2106.13008).

    Example:
        >>> q = k = v = torch.randn(32, 96, 8, 64)
        >>> auto_correlation(q, k, v, 3, mode="batch" if training else "sample").shape
        torch.Size([32, 96, 8, 64])
    """
    _check(q, k, v, factor, mode)
    backend = choose(
        "auto_correlation", device=q.device.type, dtype=q.dtype, channel=mode == "channel"
    ).backend
    run = reference.auto_correlation if backend == "reference" else dense.auto_correlation
    return run(q, k, v, factor, mode=mode, even_lags=even_lags)


def _check(q: Tensor, k: Tensor, v: Tensor, factor: float, mode: str) -> None:
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(
            f"auto_correlation: q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if mode not in MODES:
        raise ValueError(f"auto_correlation: mode must be one of {', '.join(MODES)}, not {mode!r}")
    if not factor > 0:
        raise ValueError(f"auto_correlation: factor must be positive, not {factor}")
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise ValueError(f"auto_correlation: q must be [B, L, H, E], L, H and E > 0, not {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:] or x.shape[1] == 0:
            raise ValueError(
                f"auto_correlation: {name} must be [{q.shape[0]}, S, {q.shape[2]}, {q.shape[3]}] with S > 0, "
                f"not {tuple(x.shape)}"
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"auto_correlation: k has {k.shape[1]} positions and v has {v.shape[1]}")
