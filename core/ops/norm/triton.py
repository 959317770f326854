"""Triton kernels of the row norms: one trip to memory each way, the residual add included.

Forward: a program normalises a tile of whole rows. Backward: each of a fixed number of programs walks its
tiles and keeps its share of the weight's and the bias's gradient in registers; the shares are written side by
side and summed by a second kernel, so there are no atomics and the sum has one order. The mathematics is in
README.md.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.core.aot import Variant

MAX_ROW = 8192  # of the backward: a row's tile and its two sums stay in registers up to here


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
        4096: Config(1, 16, 132),
        8192: Config(1, 32, 132),
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
        4096: Config(1, 16, 108),
        8192: Config(1, 32, 108),
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


@triton.jit(do_not_specialize=["count"])
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    z,
    stats,
    count,
    x_row,
    residual_row,
    eps,
    d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: rows x d may pass 2^31
    col = tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (col < d)[None, :]
    at = row[:, None] * d + col[None, :]
    v = tl.load(x + row[:, None] * x_row + col[None, :], mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if residual is not None:
        v += tl.load(residual + row[:, None] * residual_row + col[None, :], mask, other=0.0).to(tl.float32)
        stored = v.to(z.dtype.element_ty)
        tl.store(z + at, stored, mask)
        v = stored.to(tl.float32)  # the norm of what the backward will read
    shift = tl.zeros([ROWS], tl.float32)
    if KIND == "layer":
        shift = tl.sum(v, 1) / d
        v = tl.where(mask, v - shift[:, None], 0.0)
        square = tl.sum(v * v, 1) / d
    elif KIND == "crms":
        shift = tl.sum(v, 1)
        square = (tl.sum(v * v, 1) + shift * shift) / (d + 1)
    else:
        square = tl.sum(v * v, 1) / d
    rstd = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    tl.store(stats + row, rstd, row < count)
    tl.store(stats + count + row, shift, row < count)
    v *= rstd[:, None]
    if weight is not None:
        v *= tl.load(weight + col, col < d, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + col, col < d, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def _backward(
    dy,
    dz,
    z,
    stats,
    weight,
    out,
    shares,
    count,
    dy_row,
    dz_row,
    z_row,
    d,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    step = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    if weight is not None:
        w = tl.load(weight + col, col < d, other=0.0).to(tl.float32)[None, :]
    for tile in range(first, tl.cdiv(count, ROWS), step):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < count
        mask = inside[:, None] & (col < d)[None, :]
        rstd = tl.load(stats + row, inside, other=0.0)[:, None]
        shift = tl.load(stats + count + row, inside, other=0.0)[:, None]
        g = tl.load(dy + row[:, None] * dy_row + col[None, :], mask, other=0.0).to(tl.float32)
        v = tl.load(z + row[:, None] * z_row + col[None, :], mask, other=0.0).to(tl.float32)
        if KIND == "layer":
            v = tl.where(mask, v - shift, 0.0)
        if shares is not None:
            dw += g * (v * rstd)
            db += g
        if weight is not None:
            g *= w
        # v itself, not the rounded v * rstd: what follows cancels in short rows. And one factor after the
        # other: the cube of a small rstd underflows.
        pull = tl.sum(g * v, 1)[:, None] * rstd * rstd * rstd
        if KIND == "layer":
            g = (g - tl.sum(g, 1)[:, None] / d) * rstd - v * (pull / d)
        elif KIND == "crms":
            g = g * rstd - (v + shift) * (pull / (d + 1))
        else:
            g = g * rstd - v * (pull / d)
        if dz is not None:
            g += tl.load(dz + row[:, None] * dz_row + col[None, :], mask, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * d + col[None, :], g.to(out.dtype.element_ty), mask)
    if shares is not None:
        tl.store(shares + first * d + col, tl.sum(dw, 0), col < d)
        tl.store(shares + (step + first) * d + col, tl.sum(db, 0), col < d)


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
    block, config, _ = configs(d, _arch(x))
    if count:
        _forward[(triton.cdiv(count, config.rows),)](
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
    block, _, config = configs(d, _arch(z))
    programs = min(config.programs, triton.cdiv(count, config.rows))
    shares = torch.empty(2, programs, d, dtype=torch.float32, device=z.device) if affine else None
    if count:
        _backward[(programs,)](
            grad,
            direct,
            rows,
            stats,
            _vector(weight),
            out,
            shares,
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
    if shares is None:
        return out, torch.empty(0, d, dtype=torch.float32, device=z.device)
    return out, shares.sum(1)


def _rows(x: Tensor) -> Tensor:
    """x as `[rows, d]` with the last axis dense: a view wherever its strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _arch(x: Tensor) -> int:
    if not x.is_cuda:
        return 90  # the interpreter
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: every launch of the table, with all of its arguments.

    LayerNorm with a residual and both vectors holds the most registers, so it stands for the others; their
    variants, float32 and unaligned rows are in the slow gate.
    """
    found = []
    for arch, block in itertools.product(_BACKWARD, _FORWARD):
        for kind, dtype, aligned in itertools.product(
            ("layer", "rms", "crms"), ("bf16", "fp32"), (True, False)
        ):
            slow = (kind, dtype, aligned) != ("layer", "bf16", True)
            found += [_variant(k, arch, block, kind, dtype, aligned, slow) for k in (_forward, _backward)]
    return found


def _variant(kernel: Any, arch: int, block: int, kind: str, dtype: str, aligned: bool, slow: bool) -> Variant:
    _, forward_config, backward_config = configs(block, arch)
    config = forward_config if kernel is _forward else backward_config
    types = {"eps": "fp32", "stats": "*fp32", "shares": "*fp32", "weight": "*fp32", "bias": "*fp32"}
    counts = ("count", "x_row", "residual_row", "dy_row", "dz_row", "z_row", "d")
    return Variant(
        kernel=f"{__name__}:{kernel.__name__}",
        signature=dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(counts, "i32") | types,
        constants={"KIND": kind, "ROWS": config.rows, "BLOCK": block},
        arch=arch,
        label=f"{dtype} {kind} {config.rows}x{block}",
        divisible=counts[1:] if aligned else (),
        num_warps=config.warps,
        slow=slow,
    )
