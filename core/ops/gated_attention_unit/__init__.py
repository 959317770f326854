"""MossFormer's attention: squared ReLU inside groups of frames, linear attention over all, and gates.

README.md beside this file derives the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.gated_attention_unit import cpu, custom_op, reference

__all__ = ["gated_attention_unit"]

OP = "gated_attention_unit"


def gated_attention_unit(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    group_size: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attend to v and u within a frame's group and, linearly, to all frames; then gate the two by each other.

    With a = relu(quad_q quad_k^T / group_size)^2 inside groups, and n frames in all:

        att(x) = a x + lin_q (lin_k^T x) / n
        result = att(u) * v * sigmoid(att(v) * u)

    Causal: a frame sees its group up to itself, and linearly the groups before, group_size in n's place.

    Args:
        quad_q, quad_k: Queries and keys of the part inside groups.
        lin_q, lin_k: Queries and keys of the linear part.
        v, u: Values, each the other's gate. Without u, v is both side by side, as a projection gives them:
            a gradient of the two halves that needs no copy to become that of the whole.
        group_size: Frames of a group; the last may have fewer.
        causal: See above.
        mask: True where a frame is attended to. Others still attend, and count in n, as published; what they
            hold must be finite.
        lengths: Frames of each row. Later ones neither attend nor count, whatever they hold, and their result
            is zero: a batch's rows are those of its recordings one by one.

    Shape:
        quad_q, quad_k, lin_q, lin_k `[B, S, K]`; v, u and the result `[B, S, E]`, or v `[B, S, 2 E]`; mask
        `[B, S]`; lengths `[B]`.

    Raises:
        TypeError: The six are not of one floating dtype, mask is not boolean, lengths are not whole numbers.
        ValueError: A shape is wrong, or group_size is not positive.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Zhao and Ma 2023, MossFormer (arXiv 2302.11824), after Hua et al. 2022 (arXiv 2202.10447).

    Example:
        >>> gated_attention_unit(*torch.randn(4, 1, 4000, 128), torch.randn(1, 4000, 2048)).shape
        torch.Size([1, 4000, 1024])
    """
    _check((quad_q, quad_k, lin_q, lin_k), v, u, group_size, mask, lengths)
    backend = choose(OP, device=v.device.type, dtype=v.dtype).backend
    if backend == "reference" or v.numel() == 0:
        options = {"group_size": group_size, "causal": causal, "mask": mask, "lengths": lengths}
        return reference.gated_attention_unit(quad_q, quad_k, lin_q, lin_k, v, u, **options)  # type: ignore[arg-type]
    given = (quad_q, quad_k, lin_q, lin_k, v, u)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if learns or torch.compiler.is_compiling():
        return custom_op.gated_attention_unit_op(*given, mask, lengths, group_size, causal, backend)[0]
    return cpu.forward(*given, mask, lengths, group_size, causal, backend, False)[0]


def _check(
    small: tuple[Tensor, ...],
    v: Tensor,
    u: Tensor | None,
    group_size: int,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> None:
    names = ("quad_q", "quad_k", "lin_q", "lin_k")
    if not v.is_floating_point():
        raise TypeError(f"{OP}: v must be floating point, not {v.dtype}")
    for name, x in zip((*names, "u"), (*small, u), strict=True):
        if x is not None and x.dtype != v.dtype:
            raise TypeError(f"{OP}: {name} must have v's dtype {v.dtype}, not {x.dtype}")
    if u is None and (v.ndim != 3 or v.shape[2] % 2):
        raise ValueError(f"{OP}: v without u must be [B, S, 2 E], not {tuple(v.shape)}")
    if u is not None and (v.ndim != 3 or u.shape != v.shape):
        raise ValueError(
            f"{OP}: v and u must be [B, S, E], both of one shape, not {tuple(v.shape)} and {tuple(u.shape)}"
        )
    wanted = (*v.shape[:2], small[0].shape[-1])
    for name, x in zip(names, small, strict=True):
        if x.shape != wanted:
            raise ValueError(f"{OP}: {name} must be {list(wanted)}, not {list(x.shape)}")
    if group_size < 1:
        raise ValueError(f"{OP}: group_size must be positive, not {group_size}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{OP}: mask must be boolean, not {mask.dtype}")
    if mask is not None and mask.shape != v.shape[:2]:
        raise ValueError(f"{OP}: mask must be {list(v.shape[:2])}, not {list(mask.shape)}")
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise TypeError(f"{OP}: lengths must be whole numbers, not {lengths.dtype}")
    if lengths is not None and lengths.shape != v.shape[:1]:
        raise ValueError(f"{OP}: lengths must be [{v.shape[0]}], not {list(lengths.shape)}")
