"""Flow attention: weights from the conservation of flows between values and queries, in linear time."""

from __future__ import annotations

from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.flow_attention import flows, reference
from manyheads.core.ops.precision import wide

__all__ = ["flow_attention"]


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: float | None = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Attend by flows: values compete for what they send, queries are allotted what they take in.

    Args:
        q, k, v: Queries (sinks), keys and values (sources).
        causal: A step sees no later one; sums are then running ones, normalised by the position.
        clamp: Bound of the source flows, up and down, before they compete. 1.0 is the paper's code; None, no
            bound, the copies of it in the forecasters' code.
        eps: Added to both operands of every flow.

    Shape:
        q `[B, L, H, K]`, k `[B, S, H, K]`, v `[B, S, H, V]`, the result `[B, L, H, V]`. Causal: L = S.

    Returns:
        The outputs in v's dtype; sums and weights are float32 (float64 for float64 inputs).

    Raises:
        TypeError: q, k, v are not of one floating dtype.
        ValueError: A shape or `clamp` is wrong.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Wu et al. 2022 (Flowformer, arXiv 2202.06258).

    Example:
        >>> flow_attention(torch.randn(2, 9, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(2, 7, 4, 8)).shape
        torch.Size([2, 9, 4, 8])
    """
    _check(q, k, v, causal, clamp)
    if _backend(q, k, v) == "reference":
        return reference.flow_attention(q, k, v, causal=causal, clamp=clamp, eps=eps)
    form = flows.causal if causal else flows.everything
    return form(wide(q).sigmoid(), wide(k).sigmoid(), wide(v), clamp, eps).to(v.dtype)


def _backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    (sinks, width), sources, values = q.shape[1::2], k.shape[1], v.shape[3]
    # All pairs, five times for the flows and weights and once for the values, or a state, twice.
    short = sinks * sources * (5 * width + values) <= (sinks + sources) * width * values
    about = {"length": "short" if short else "usual"}
    return choose("flow_attention", device=q.device.type, dtype=q.dtype, **about).backend


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, clamp: float | None) -> None:
    op = "flow_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be [B, N, H, D], not {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(f"{op}: q, k and v must have one floating dtype; {name} is {x.dtype}")
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must agree in all but their lengths")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: k {list(k.shape)} and v {list(v.shape)} must agree in B, N and H")
    if k.shape[1] == 0:
        raise ValueError(f"{op}: there is no key")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: causal, q and k must be of one length, not {q.shape[1]} and {k.shape[1]}")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be positive or None, not {clamp}")
