"""Attention over packed sequences: no padding is stored, read or computed.

Derivations are in README.md beside this file.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops import packed
from manyheads.core.ops.varlen_attention import reference
from manyheads.core.ops.varlen_attention.custom_op import varlen_attention_op

__all__ = ["varlen_attention"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend within each of the sequences that lie one after another: `softmax(scale * q k^T + bias) v`.

    Args:
        q: Queries of all sequences.
        k: Keys; fewer heads than the queries' share them in groups (grouped-query attention).
        v: Values.
        cu_seqlens_q: Each sequence's first row of q, and the end of the last: 0, L1, L1 + L2, ..., T. An
            empty sequence is allowed. Values are checked on a CPU; on a GPU wrong ones give wrong results.
        cu_seqlens_k: The same of k and v; None means the queries'.
        bias: Added to the scores by relative position, with its gradient: key j and query i of a sequence get
            `bias[h, clip(j - i, -M, M) + M]`. Positions count from the end: a sequence's last query stands at
            its last key.
        causal: A query sees the keys up to its own position; one that sees none gives zeros.
        scale: Of the products; None means `1 / sqrt(D)`.

    Shape:
        q `[Tq, H, D]`; k, v `[Tk, Hk, D]`, Hk divides H; cu_seqlens int32 `[B + 1]`; bias `[H, 2M + 1]`; the
        result `[Tq, H, D]`.

    Raises:
        TypeError: q, k, v are not of one floating dtype, bias not floating, cu_seqlens not int32.
        ValueError: A shape or a device is wrong, or cu_seqlens do not rise from 0 to T.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Packed batches: Zhai et al. 2022, ByteTransformer (arXiv 2210.03052). Blockwise computation: Dao 2023
        (arXiv 2307.08691). Bias by clipped relative position: Raffel et al. 2019 (arXiv 1910.10683), here one
        entry a distance.

    Example:
        >>> q = k = v = torch.randn(300, 8, 64)
        >>> lengths = torch.tensor([0, 100, 300], dtype=torch.int32)  # 100 tokens, then 200
        >>> varlen_attention(q, k, v, lengths, causal=True).shape
        torch.Size([300, 8, 64])
    """
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_k, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose("varlen_attention", device=q.device.type, dtype=q.dtype, head_dim=q.shape[-1])
    if choice.backend == "reference":
        return reference.varlen_attention(
            q, k, v, cu_seqlens_q, cu_k, bias=bias, causal=causal, scale=scale
        )  # fmt: skip
    return varlen_attention_op(q, k, v, cu_seqlens_q, cu_k, bias, causal, scale, choice.backend)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"varlen_attention: {name} must be [T, H, D], not {list(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"varlen_attention: q, k and v must have one floating dtype; {name} is {x.dtype}, q is "
                f"{q.dtype}"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"varlen_attention: k and v must have one shape, not {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(
            f"varlen_attention: q {list(q.shape)} and k {list(k.shape)} must agree in D, and D be at least 1"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"varlen_attention: the {k.shape[1]} key heads must divide the {q.shape[1]} query heads"
        )
    for name, cu, x in (("cu_seqlens_q", cu_q, q), ("cu_seqlens_k", cu_k, k)):
        packed.check("varlen_attention", cu, x.shape[0], name=name)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"varlen_attention: cu_seqlens_q is of {cu_q.shape[0] - 1} sequences, cu_seqlens_k of "
            f"{cu_k.shape[0] - 1}"
        )
    _check_bias(q, bias)
    others = {"k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "bias": bias}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"varlen_attention: {name} is on {other.device}, q is on {q.device}")


def _check_bias(q: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(f"varlen_attention: bias must be floating, not {bias.dtype}")
    if bias.dim() != 2 or bias.shape[0] != q.shape[1] or bias.shape[1] % 2 == 0:
        raise ValueError(
            f"varlen_attention: bias must be [H, 2M + 1] with H = {q.shape[1]}, not {list(bias.shape)}"
        )
