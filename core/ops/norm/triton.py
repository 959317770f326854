"""Launches of the row norms' Triton kernels: the table of configurations, forward, backward, the gate's list.

There are no atomics: each program of the backward writes its share of the weight's and the bias's gradient
beside the others', and one sum over them has one order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from manyheads.core.aot import Variant
from manyheads.core.ops.launches import architecture
from manyheads.core.ops.norm.triton_kernels import backward_kernel, forward_kernel, vectors_kernel

MAX_ROW = 8192
_SPLIT_ABOVE = 4096  # wider rows leave no registers for the two sums: these get a kernel of their own
_SPLIT_BLOCK, _SPLIT_ROWS, _SPLIT_WARPS = 512, 4, 4


@dataclass(frozen=True)
class Config:
    """A launch: rows a program takes at a time, warps, and (backward) the most programs."""

    rows: int
    warps: int
    programs: int = 0


# Keyed by the row's length rounded up to a power of two. A thread holds at most 16 elements of a tile: one to
# four vector loads. More rows a program would only add registers.
_FORWARD = {
    16: Config(64, 4),
    32: Config(32, 4),
    64: Config(32, 4),
    128: Config(16, 4),
    256: Config(8, 4),
    512: Config(4, 4),
    1024: Config(2, 4),
    2048: Config(1, 4),
    4096: Config(1, 8),
    8192: Config(1, 16),
}
# Four programs on each of 132 (compute capability 9.0) or 108 (8.0) multiprocessors, fewer if wide.
_BACKWARD = {
    90: {
        16: Config(64, 4, 528),
        32: Config(32, 4, 528),
        64: Config(16, 4, 528),
        128: Config(8, 4, 528),
        256: Config(4, 4, 528),
        512: Config(2, 4, 528),
        1024: Config(1, 4, 528),
        2048: Config(1, 8, 264),
        4096: Config(1, 8, 264),
        8192: Config(1, 16, 264),
    },
    80: {
        16: Config(64, 4, 432),
        32: Config(32, 4, 432),
        64: Config(16, 4, 432),
        128: Config(8, 4, 432),
        256: Config(4, 4, 432),
        512: Config(2, 4, 432),
        1024: Config(1, 4, 432),
        2048: Config(1, 8, 216),
        4096: Config(1, 8, 216),
        8192: Config(1, 16, 216),
    },
}


def configs(d: int, arch: int = 90) -> tuple[int, Config, Config]:
    """The tile width of rows of length d, and the forward's and backward's launches on an architecture.

    Args:
        arch: Compute capability times ten; the nearest one at or below it in the table is taken.

    Example:
        >>> configs(768)[0]
        1024
    """
    block = max(16, triton.next_power_of_2(d))
    known = max((a for a in _BACKWARD if a <= arch), default=min(_BACKWARD))
    return block, _FORWARD[block], _BACKWARD[known][block]


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of x + residual; arguments and results as `cpu.forward`."""
    d = x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    z = x if residual is None else torch.empty_like(y)
    rows = _rows(x)
    added = None if residual is None else _rows(residual)
    count = rows.shape[0]
    stats = torch.empty(2, count, dtype=torch.float32, device=x.device)
    block, config, _ = configs(d, architecture(x))
    if count:
        forward_kernel[(triton.cdiv(count, config.rows),)](
            rows,
            added,
            _vector(weight),
            _vector(bias),
            y,
            None if residual is None else z,
            stats,
            count,
            rows.stride(0),
            0 if added is None else added.stride(0),
            eps,
            d,
            KIND=kind,
            ROWS=config.rows,
            BLOCK=block,
            num_warps=config.warps,
        )
    return y, z, stats


def backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    kind: str,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """Pull the gradients of y and z back; arguments and results as `cpu.backward`."""
    d = z.shape[-1]
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad, rows = _rows(dy), _rows(z)
    direct = None if dz is None else _rows(dz)
    count = rows.shape[0]
    block, _, config = configs(d, architecture(z))
    programs = min(config.programs, triton.cdiv(count, config.rows))
    shares = torch.empty(2, programs, d, dtype=torch.float32, device=z.device) if affine else None
    split = block > _SPLIT_ABOVE
    if count:
        backward_kernel[(programs,)](
            grad,
            direct,
            rows,
            stats,
            _vector(weight),
            out,
            None if split else shares,
            count,
            grad.stride(0),
            0 if direct is None else direct.stride(0),
            rows.stride(0),
            d,
            KIND=kind,
            ROWS=config.rows,
            BLOCK=block,
            num_warps=config.warps,
        )
    if count and split and shares is not None:
        vectors_kernel[(programs, triton.cdiv(d, _SPLIT_BLOCK))](
            grad,
            rows,
            stats,
            shares,
            count,
            grad.stride(0),
            rows.stride(0),
            d,
            KIND=kind,
            ROWS=_SPLIT_ROWS,
            BLOCK=_SPLIT_BLOCK,
            num_warps=_SPLIT_WARPS,
        )
    if shares is None:
        return out, torch.empty(0, d, dtype=torch.float32, device=z.device)
    return out, shares.sum(1)


def _rows(x: Tensor) -> Tensor:
    """x as `[rows, d]` with the last axis dense: a view wherever its strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: every launch of the table, with all of its arguments.

    LayerNorm with a residual and both vectors holds the most registers, so it stands for the others; their
    variants, float32 and unaligned rows are in the slow gate.
    """
    found = []
    options = list(itertools.product(("layer", "rms", "crms"), ("bf16", "fp32"), (True, False)))
    for arch, (kind, dtype, aligned) in itertools.product(_BACKWARD, options):
        slow = (kind, dtype, aligned) != ("layer", "bf16", True)
        for block in _FORWARD:
            _, ahead, back = configs(block, arch)
            wide = block > _SPLIT_ABOVE
            found.append(_variant(forward_kernel, arch, ahead, block, kind, dtype, aligned, slow))
            found.append(_variant(backward_kernel, arch, back, block, kind, dtype, aligned, slow, wide))
        split = Config(_SPLIT_ROWS, _SPLIT_WARPS)
        found.append(_variant(vectors_kernel, arch, split, _SPLIT_BLOCK, kind, dtype, aligned, slow))
    return found


def _variant(
    kernel: Any,
    arch: int,
    config: Config,
    block: int,
    kind: str,
    dtype: str,
    aligned: bool,
    slow: bool,
    wide: bool = False,
) -> Variant:
    types = {"eps": "fp32", "stats": "*fp32", "shares": "*fp32", "weight": "*fp32", "bias": "*fp32"}
    counts = ("count", "x_row", "residual_row", "dy_row", "dz_row", "z_row", "d")
    constants: dict[str, str | int | None] = {"KIND": kind, "ROWS": config.rows, "BLOCK": block}
    if wide:
        constants["shares"] = None
    return Variant(
        kernel=f"{kernel.__module__}:{kernel.__name__}",
        signature=dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(counts, "i32") | types,
        constants=constants,
        arch=arch,
        label=f"{dtype} {kind} {config.rows}x{block}",
        divisible=counts[1:] if aligned else (),
        num_warps=config.warps,
        slow=slow,
    )
