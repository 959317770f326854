"""Launches of the selective scan's Triton kernels: the table, forward, backward, the gate's list.

There are no atomics: what several programs share, each writes its part of, and one sum adds them up.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.ops.selective_scan.inputs import CHUNK, Gradients, Inputs
from manyheads.core.ops.selective_scan.triton_kernels import backward_kernel, forward_kernel

# States (rounded up to a power of two, 8 at least) to the channels of a program and its warps. A thread holds
# at most 32 states in the forward, 4 or 8 in the backward, whose tiles are many.
_FORWARD = {8: (32, 1), 16: (32, 1), 32: (32, 1), 64: (16, 4), 128: (32, 8), 256: (16, 8)}
_BACKWARD = {8: (32, 2), 16: (32, 4), 32: (16, 4), 64: (8, 8), 128: (8, 8), 256: (4, 8)}


def forward(x: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; arguments and results as `cpu.forward`."""
    d, n = x.A.shape
    y = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device)
    last = torch.empty(x.sequences(), d, n, dtype=torch.float32, device=x.u.device)
    kept = torch.empty(x.slots() if keep else 0, n, d, dtype=torch.float32, device=x.u.device)
    rows, row_lengths = _rows(x)
    u, delta, b, c, z = rows
    options = _options(x, _FORWARD)
    if d and x.sequences():
        forward_kernel[(x.sequences(), triton.cdiv(d, options["BLOCK"]))](
            u, delta, x.A.contiguous(), b, c, _vector(x.D), z, _vector(x.delta_bias),
            _vector(x.initial_state), _vector(x.cu_seqlens), y, last, kept if keep else None,
            x.u.shape[1], d, n, *row_lengths, **options,
        )  # fmt: skip
    return y, last, kept


def backward(x: Inputs, kept: Tensor, dy: Tensor, dlast: Tensor | None) -> Gradients:
    """Pull the gradients of y and of the last states back; arguments and results as `cpu.backward`."""
    (batch, length, d), n, sequences = x.u.shape, x.A.shape[1], x.sequences()
    options = _options(x, _BACKWARD)
    columns = triton.cdiv(d, options["BLOCK"])

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.u.device)

    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    du, ddelta = like(x.u), like(x.delta)
    dz = None if x.z is None else like(x.z)
    da, db, dc = new(sequences, d, n), new(columns, batch * length, n), new(columns, batch * length, n)
    dskip = None if x.D is None else new(sequences, d)
    dbias = None if x.delta_bias is None else new(sequences, d)
    dfirst = None if x.initial_state is None else new(sequences, d, n)
    scratch = new(sequences * columns, CHUNK, options["N"], options["BLOCK"])
    (u, delta, b, c, z), row_lengths = _rows(x)
    grad = _row_view(dy)
    if d and sequences:
        backward_kernel[(sequences, columns)](
            grad, _vector(dlast), u, delta, x.A.contiguous(), b, c, _vector(x.D), z,
            _vector(x.delta_bias), _vector(x.cu_seqlens), kept, scratch, du, ddelta, dz, da, db, dc,
            dskip, dbias, dfirst, length, batch * length, d, n, _row_length(grad), *row_lengths, **options,
        )  # fmt: skip
    return (
        du,
        ddelta,
        da.sum(0),
        db.sum(0).view(x.B.shape),
        dc.sum(0).view(x.C.shape),
        None if dskip is None else dskip.sum(0),
        dz,
        None if dbias is None else dbias.sum(0),
        dfirst,
    )


def _options(x: Inputs, table: dict[int, tuple[int, int]]) -> dict[str, Any]:
    states = max(8, triton.next_power_of_2(x.A.shape[1]))
    block, warps = table[states]
    return {
        "CHUNK": CHUNK,
        "SOFTPLUS": x.delta_softplus,
        "REVERSE": x.reverse,
        "N": states,
        "BLOCK": block,
        "num_warps": warps,
        "num_stages": 1,
    }


def _rows(x: Inputs) -> tuple[list[Tensor | None], list[int]]:
    """u, delta, B, C and z with dense channels, and how far apart their rows are."""
    rows = [None if t is None else _row_view(t) for t in (x.u, x.delta, x.B, x.C, x.z)]
    return rows, [0 if t is None else _row_length(t) for t in rows]


def _row_view(x: Tensor) -> Tensor:
    """The tensor itself where all B * L rows are equally far apart, or a copy."""
    batch, length, d = x.shape
    dense = d == 1 or x.stride(2) == 1
    even = batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)
    return x if dense and even else x.contiguous()


def _row_length(x: Tensor) -> int:
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: every launch of the table, with all of its arguments.

    16 states, with everything that may be given, in bfloat16 and forward in time, stand for the others; these
    are in the slow gate, where float16, which loads as bfloat16 does, and backward in time have 16 states.
    """
    found = []
    types = itertools.product(ARCHITECTURES, _FORWARD, ("bf16", "fp16", "fp32"), (True, False), (False, True))
    for arch, states, dtype, aligned, reverse in types:
        if states != 16 and (dtype == "fp16" or reverse):
            continue
        slow = dtype != "bf16" or reverse or states != 16
        found += _variants(arch, dtype, aligned, reverse, states, slow)
    return found


def _variants(arch: int, dtype: str, aligned: bool, reverse: bool, states: int, slow: bool) -> list[Variant]:
    half = ("u", "delta", "b", "c", "z", "y", "dy", "du", "ddelta", "dz")
    counts = ("d", "n", "u_row", "delta_row", "b_row", "c_row", "z_row", "dy_row")
    found = []
    for kernel, table in ((forward_kernel, _FORWARD), (backward_kernel, _BACKWARD)):
        block, warps = table[states]
        names = kernel.arg_names
        signature = dict.fromkeys(names, "*fp32") | {name: f"*{dtype}" for name in half if name in names}
        signature |= dict.fromkeys((name for name in (*counts, "length", "total") if name in names), "i32")
        signature["starts"] = "*i32"
        constants = {"CHUNK": CHUNK, "SOFTPLUS": True, "REVERSE": reverse, "N": states, "BLOCK": block}
        found.append(
            Variant(
                kernel=f"{kernel.__module__}:{kernel.__name__}",
                signature=signature,
                constants=constants,
                arch=arch,
                label=f"{dtype} N{states}{' reverse' if reverse else ''}",
                divisible=tuple(name for name in counts if name in names) if aligned else (),
                num_warps=warps,
                num_stages=1,
                slow=slow,
            )
        )
    return found
