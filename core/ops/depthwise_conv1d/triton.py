"""Launches of the depthwise convolution's Triton kernels: table of configurations, forward, backward, gate.

There are no atomics: each program of the backward writes its share of the taps' and the bias's gradients
beside the others', and one sum over them has one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from manyheads.core.aot import Variant
from manyheads.core.ops.depthwise_conv1d.triton_kernels import (
    forward_kernel,
    past_kernel,
    share_kernel,
    short_backward_kernel,
)
from manyheads.core.ops.launches import dense

# Up to this width the gradient before SiLU is recomputed at each shift, and one kernel does it all.
_SHORT = 4
# Taps that are loaded before the first one is needed.
_GROUP = 4
_PAST_ROWS, _PAST_WARPS = 4, 2


@dataclass(frozen=True)
class Config:
    """A launch: tokens and channels of a tile, warps, and the most programs where sums are shared."""

    rows: int
    block: int
    warps: int
    programs: int = 264


# Keyed by the channels, rounded up to a power of two. A thread holds 8 elements of a tile, and five sums of
# each where the backward keeps those; a row of a tile is a line of memory, and tall tiles share the rows that
# wide filters reach. Two programs on each of 132 multiprocessors share the sums.
_TABLE = {16: Config(128, 16, 8), 32: Config(64, 32, 8), 64: Config(32, 64, 8)}
# The kernel that recomputes as well has room for half as much.
_SHORT_TABLE = {16: Config(64, 16, 8), 32: Config(32, 32, 8), 64: Config(16, 64, 8)}


def config_for(d: int, short: bool = False) -> Config:
    """The launch for d channels.

    Args:
        short: Of the backward of short filters.

    Example:
        >>> config_for(384).block
        64
    """
    return (_SHORT_TABLE if short else _TABLE)[min(64, max(16, triton.next_power_of_2(d)))]


class _Given(NamedTuple):
    """What every kernel reads."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor | None
    cu_seqlens: Tensor | None
    sequences: Tensor | None
    left: int


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """Convolve; arguments as `cpu.forward`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(_given(x, weight, bias, past, cu_seqlens, left), None, y, silu)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull the gradient of y back; as `cpu.backward`."""
    taps = weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    given, dz = _given(x, weight, bias, past, cu_seqlens, left), dense(dy)
    total = torch.empty(taps + 1, x.shape[2], dtype=torch.float32, device=x.device)
    if silu and taps <= _SHORT:
        shares = _short(given, dz, dx, vectors)
    else:
        if silu:
            before = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            _convolve(given, dz, before, True)
            dz, silu = before, False
        turned = given._replace(x=dz, weight=weight.flip(1), bias=None, past=None, left=taps - 1 - left)
        _convolve(turned, None, dx, False)
        shares = _share(given, dz) if vectors else None
    if shares is not None:
        torch.sum(shares, 0, out=total)
    dpast = torch.empty((0, 0, 0) if past is None else past.shape, dtype=torch.float32, device=x.device)
    if vectors and dpast.numel():
        _pull_past(given, dz, dpast, silu)
    return dx, total, dpast


def _given(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, left: int
) -> _Given:
    sequences = None
    if cu_seqlens is not None:  # each token's, so that no kernel has to look for it
        token = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        sequences = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    bias, past = (None if v is None else v.contiguous() for v in (bias, past))
    return _Given(dense(x), weight.contiguous(), bias, past, cu_seqlens, sequences, left)


def _convolve(given: _Given, dy: Tensor | None, y: Tensor, silu: bool) -> None:
    x = given.x
    batch, length, d = x.shape
    config = config_for(d)
    forward_kernel[(triton.cdiv(d, config.block) * triton.cdiv(length, config.rows) * batch,)](
        x,
        given.weight,
        given.bias,
        given.past,
        dy,
        y,
        given.sequences,
        given.cu_seqlens,
        length,
        d,
        given.weight.shape[1],
        given.left,
        x.stride(0),
        x.stride(1),
        0 if dy is None else dy.stride(0),
        0 if dy is None else dy.stride(1),
        SILU=silu,
        ROWS=config.rows,
        BLOCK=config.block,
        GROUP=_GROUP,
        num_warps=config.warps,
    )


def _short(given: _Given, dy: Tensor, dx: Tensor, vectors: bool) -> Tensor | None:
    x, taps = given.x, given.weight.shape[1]
    config, count, blocks, programs = _walk(x, 1, short=True)
    shares = None
    if vectors:
        shares = torch.empty(programs, taps + 1, x.shape[2], dtype=torch.float32, device=x.device)
    short_backward_kernel[(blocks, programs)](
        dy,
        x,
        given.weight,
        given.bias,
        given.past,
        dx,
        shares,
        given.sequences,
        given.cu_seqlens,
        x.shape[1],
        count,
        x.shape[2],
        taps,
        given.left,
        x.stride(0),
        x.stride(1),
        dy.stride(0),
        dy.stride(1),
        ROWS=config.rows,
        BLOCK=config.block,
        GROUP=_GROUP,
        num_warps=config.warps,
    )
    return shares


def _share(given: _Given, dz: Tensor) -> Tensor:
    x, taps = given.x, given.weight.shape[1]
    groups = triton.cdiv(taps, 4)
    config, count, blocks, programs = _walk(x, groups)
    shares = torch.empty(programs, taps + 1, x.shape[2], dtype=torch.float32, device=x.device)
    share_kernel[(blocks, programs, groups)](
        dz,
        x,
        given.past,
        shares,
        given.sequences,
        given.cu_seqlens,
        x.shape[1],
        count,
        x.shape[2],
        taps,
        given.left,
        x.stride(0),
        x.stride(1),
        dz.stride(0),
        dz.stride(1),
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return shares


def _walk(x: Tensor, groups: int, short: bool = False) -> tuple[Config, int, int, int]:
    """The launch, the tiles of tokens, the blocks of channels, and the programs that share the tiles."""
    batch, length, d = x.shape
    config = config_for(d, short)
    count, blocks = batch * triton.cdiv(length, config.rows), triton.cdiv(d, config.block)
    return config, count, blocks, max(1, min(count, config.programs // (blocks * groups)))


def _pull_past(given: _Given, dz: Tensor, dpast: Tensor, silu: bool) -> None:
    x = given.x
    config = config_for(x.shape[2])
    past_kernel[(triton.cdiv(x.shape[2], config.block), dpast.shape[0])](
        dz,
        x,
        given.weight,
        given.bias,
        given.past,
        dpast,
        given.cu_seqlens,
        x.shape[1],
        x.shape[2],
        given.weight.shape[1],
        given.left,
        x.stride(0),
        x.stride(1),
        dz.stride(0),
        dz.stride(1),
        SILU=silu,
        ROWS=_PAST_ROWS,
        BLOCK=config.block,
        GROUP=_GROUP,
        num_warps=_PAST_WARPS,
    )


# What a plain call has none of. Packed sequences with states have all: calls between the two hold less.
_LACKING = {"plain": ("past", "sequences", "cu_seqlens"), "packed state": ()}
_FORMS = (("plain", True), ("plain", False), ("packed state", False))


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: the table's launches with the most and the fewest arguments.

    With SiLU and four taps a kernel holds the most, so these stand for the others; one block of the table in
    bfloat16 is in the quick gate, the rest in the slow one.
    """
    found = []
    for arch, key, dtype, (form, aligned) in product((90, 80), _TABLE, ("bf16", "fp32"), _FORMS):
        config = _TABLE[key]
        quick = key == 64 and dtype == "bf16"
        common = (arch, dtype, form, aligned, not quick or (form == "plain" and not aligned))
        group = {"GROUP": _GROUP}
        found.append(_variant(forward_kernel, config, *common, {"SILU": True} | group, "forward"))
        found.append(_variant(share_kernel, config, *common, {}, "fp32 dz", dz="fp32"))
        found.append(_variant(short_backward_kernel, _SHORT_TABLE[key], *common, group, "backward"))
        slow = (*common[:4], True)
        found.append(_variant(forward_kernel, config, *slow, {"SILU": True} | group, "dz", dz="fp32"))
        if dtype == "bf16":
            found.append(_variant(share_kernel, config, *slow, {}, "dz"))
        if form == "plain":
            found.append(_variant(forward_kernel, config, *slow, {"SILU": False} | group, "forward"))
        else:
            state = Config(_PAST_ROWS, config.block, _PAST_WARPS)
            found.append(_variant(past_kernel, state, *common, {"SILU": True} | group, "state"))
    return found


def _variant(
    kernel: Any,
    config: Config,
    arch: int,
    dtype: str,
    form: str,
    aligned: bool,
    slow: bool,
    options: dict[str, Any],
    label: str,
    dz: str | None = None,
) -> Variant:
    names = kernel.arg_names
    strides = ("x_batch", "x_row", "dy_batch", "dy_row", "dz_batch", "dz_row")
    counts = ("length", "count", "d", "taps", "left", *strides)
    types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(counts, "i32")
    types |= {"sequences": "*i32", "cu_seqlens": "*i32", "shares": "*fp32", "dpast": "*fp32"}
    if dz is not None:
        types |= {"dz": f"*{dz}", "y": f"*{dz}"}
    constants: dict[str, Any] = {"ROWS": config.rows, "BLOCK": config.block} | options
    lacking = set(_LACKING[form])
    if kernel is forward_kernel and label == "forward":
        lacking.add("dy")
    constants |= dict.fromkeys(lacking & set(names))
    words = [dtype, label, form, *(f"{k}={v}" for k, v in options.items())]
    return Variant(
        kernel=f"{kernel.__module__}:{kernel.__name__}",
        signature={name: types[name] for name in names},
        constants=constants,
        arch=arch,
        label=f"{' '.join(words)} {config.rows}x{config.block}",
        divisible=tuple(n for n in ("d", *strides) if n in names) if aligned else (),
        num_warps=config.warps,
        slow=slow,
    )
