"""Attention weights of a layer, computed again from its input: fused kernels never show them."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

Fusion = Literal["mean", "max", "min"]


def is_plain(module: object) -> bool:
    """Tell whether a module is attention of which the weights follow from `qkv` and the norms of q and k."""
    qkv, heads = getattr(module, "qkv", None), getattr(module, "num_heads", None)
    others = ("rope", "rel_pos", "lambda_q1", "relative_position_bias_table")
    return (
        isinstance(qkv, nn.Linear)
        and isinstance(heads, int)
        and qkv.out_features % (3 * heads) == 0
        and getattr(module, "num_kv_heads", heads) == heads
        and all(getattr(module, name, None) is None for name in others)
    )


def project(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of an attention module.

    Shape:
        x `[B, N, C]`; the results `[B, H, N, D]`.
    """
    heads = cast(int, module.num_heads)
    qkv = cast(nn.Linear, module.qkv)(x).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        if norm is not None and name == "q_norm":
            q = norm(q)
        elif norm is not None:
            k = norm(k)
    return q, k, v


def weights(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's attention weights.

    Shape:
        x `[B, N, C]`; the result `[B, H, N, N]`, float32.
    """
    q, k, _ = project(module, x)
    scale = getattr(module, "scale", None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * (q.float() @ k.float().mT), -1)


def fuse(heads: Tensor, how: Fusion) -> Tensor:
    """Make one map of those of all heads.

    Shape:
        heads `[B, H, N, N]`; the result `[B, N, N]`.
    """
    if how == "mean":
        return heads.mean(1)
    return heads.amax(1) if how == "max" else heads.amin(1)
