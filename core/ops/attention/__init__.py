"""Dense attention with what the fused paths leave out: learned biases, sigmoid weights, a scale after the
softmax.

Derivations are in README.md beside this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.dispatch import explain as explain_op
from manyheads.core.ops.attention import reference
from manyheads.core.ops.attention.custom_op import attention_op
from manyheads.core.ops.attention.reference import Kind

__all__ = ["attention", "explain"]

# The CPU path keeps the weights of up to this many scores for the backward (32 MiB in float32).
KEEP = 8 * 1024 * 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: Kind = "softmax",
    post_scale: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend: `softmax(scale * q k^T + bias) v`, or with sigmoid weights.

    Args:
        q: Queries.
        k: Keys; fewer heads than the queries' share them in groups (grouped-query attention).
        v: Values.
        bias: Added to the scores before the softmax, with its gradient; an additive mask (-inf) is one, too.
        mask: True where a key takes part. A row with none gives zeros, and zero gradients.
        causal: A query sees the keys up to its own position; the last query sees the last key when Nq != Nk.
        scale: Of the products; None means `1 / sqrt(D)`.
        kind: "softmax", or "sigmoid": weights `sigmoid(scores - log Nk)`, which do not sum to one.
        post_scale: Multiplies the weights after the softmax (URPE), with its gradient.
        dropout_p: Chance that a weight is set to zero, the others being scaled by `1 / (1 - p)`. It applies
            whenever it is not zero: pass 0 outside training. `torch.manual_seed` decides the draw.

    Shape:
        q `[B, Nq, H, D]`; k, v `[B, Nk, Hk, D]`, Hk divides H; bias, mask and post_scale broadcast to
        `[B, H, Nq, Nk]`; the result `[B, Nq, H, D]`.

    Raises:
        TypeError: q, k, v are not of one floating dtype, bias or post_scale not floating, mask not boolean.
        ValueError: A shape, a device, `kind` or `dropout_p` is wrong.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Softmax: Vaswani et al. 2017. Sigmoid: Ramapuram et al. 2024 (arXiv 2409.04431). `post_scale`: Luo et
        al. 2022 (arXiv 2205.13401). Blockwise computation: Dao 2023 (arXiv 2307.08691).

    Example:
        >>> q = k = v = torch.randn(2, 100, 8, 64)
        >>> table = torch.zeros(8, 100, 100, requires_grad=True)
        >>> attention(q, k, v, bias=table).shape
        torch.Size([2, 100, 8, 64])
    """
    _check(q, k, v, bias, mask, post_scale, kind, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    features = _features(q, bias, post_scale, kind, dropout_p)
    backend = choose("attention", device=q.device.type, dtype=q.dtype, **features).backend
    if bias is not None and not features["learned_bias"]:
        bias = bias.detach()  # one that merely could require grad would cost torch's fast path
    return _run(backend, q, k, v, bias, mask, causal, scale, kind, post_scale, dropout_p)


def _run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    kind: Kind,
    post_scale: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if q.numel() == 0 or k.shape[1] == 0:
        # Nothing to attend to: zeros, with a (zero) gradient like any other result.
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    if backend == "torch":
        return _sdpa(q, k, v, bias, mask, causal, scale, dropout_p)
    if backend == "reference":
        return reference.attention(
            q, k, v, bias=bias, mask=mask, causal=causal, scale=scale, kind=kind, post_scale=post_scale,
            dropout_p=dropout_p,
        )  # fmt: skip
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if dropout_p else None
    options = (causal, scale, kind == "sigmoid", dropout_p, backend, backend == "cpu" and _keeps(q, k))
    return attention_op(q, k, v, bias, mask, post_scale, seed, *options)[0]


def _keeps(q: Tensor, k: Tensor) -> bool:
    """With few scores the backward is faster with the weights at hand than computing them again."""
    return torch.is_grad_enabled() and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= KEEP


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: Kind = "softmax",
    post_scale: Tensor | None = None,
    dropout_p: float = 0.0,
) -> str:
    """Say which backend `attention` would take for these arguments, and why.

    Raises:
        TypeError: As `attention`.
        ValueError: As `attention`.
        UsageError: As `attention`.
    """
    _check(q, k, v, bias, mask, post_scale, kind, dropout_p)
    features = _features(q, bias, post_scale, kind, dropout_p)
    return explain_op("attention", device=q.device.type, dtype=q.dtype, **features)


def _features(
    q: Tensor,
    bias: Tensor | None,
    post_scale: Tensor | None,
    kind: Kind,
    dropout_p: float,
) -> dict[str, bool | int | str]:
    return {
        "learned_bias": bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        "post_scale": post_scale is not None,
        "dropout": dropout_p > 0,
        "kind": kind,
        "head_dim": q.shape[-1],
    }


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Torch's fused attention, which aligns its causal mask to the top left and takes one mask or bias."""
    groups, nq, nk = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    if causal and (nq != nk or mask is not None or bias is not None):
        triangle = reference.causal_mask(nq, nk, q.device)
        mask, causal = triangle if mask is None else mask & triangle, False
    dead = None
    if q.device.type != "cpu":  # the CPU kernel gives zeros for a row without keys; others may give NaN
        mask, bias, dead = _revive(mask, bias)
    if bias is not None:
        bias = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    added = mask if bias is None else bias
    if added is not None and added.dim() < 4:
        added = added.expand(*(1,) * (4 - added.dim()), *added.shape)
    if groups > 1 and added is not None:  # grouped heads have no fused path with a mask
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=added, dropout_p=dropout_p, is_causal=causal, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip
    return out if dead is None else out.masked_fill(dead.transpose(1, 2), 0.0)


def _revive(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Let rows without keys see every key, and tell which they are, to set their output to zero."""
    hidden = None if mask is None else ~mask
    if bias is not None:
        closed = bias == float("-inf")
        hidden = closed if hidden is None else hidden | closed
    if hidden is None:
        return mask, bias, None
    dead = hidden.all(-1, keepdim=True)  # [B or 1, H or 1, Nq or 1, 1]
    dead = dead.expand(*(1,) * (4 - dead.dim()), *dead.shape)
    mask = None if mask is None else mask | dead
    return mask, None if bias is None else bias.masked_fill(dead, 0.0), dead


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    kind: str,
    dropout_p: float,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], not {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one floating dtype; {name} is {x.dtype}, q is {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, not {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in B and D, and D be at least 1"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} key heads must divide the {q.shape[2]} query heads")
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind must be 'softmax' or 'sigmoid', not {kind!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, extra in (("bias", bias), ("mask", mask), ("post_scale", post_scale)):
        if extra is not None:
            _check_extra(name, extra, scores, q.device)


def _check_extra(name: str, x: Tensor, scores: tuple[int, ...], device: torch.device) -> None:
    if name == "mask" and x.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True takes part), not {x.dtype}; an additive mask is a bias")
    if name != "mask" and not x.is_floating_point():
        raise TypeError(f"{name} must be floating, not {x.dtype}")
    fits = x.dim() <= 4 and all(n in (1, m) for n, m in zip(x.shape[::-1], scores[::-1], strict=False))
    if not fits:
        raise ValueError(f"{name} {list(x.shape)} does not broadcast to [B, H, Nq, Nk] = {list(scores)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, q is on {device}")
