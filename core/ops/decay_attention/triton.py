"""Launches of the Triton kernels of linear attention with decay: forward, backward, the gate's list.

No atomics: each program writes what is its own, and shares of a gradient are summed afterwards.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.ops.decay_attention.chunks import most_chunks
from manyheads.core.ops.decay_attention.cpu import chunk_size
from manyheads.core.ops.decay_attention.triton_kernels import (
    gradients_kernel,
    outputs_kernel,
    states_kernel,
)
from manyheads.core.ops.launches import architecture


@dataclass(frozen=True)
class Config:
    """A launch: the largest blocks of key and value channels, and warps."""

    keys: int
    values: int
    warps: int


# By kernel, gate and bytes of an element: the largest blocks tried that spill no registers.
CONFIGS = {
    ("states", "scalar", 2): Config(64, 32, 8),
    ("states", "vector", 2): Config(64, 32, 8),
    ("outputs", "scalar", 2): Config(64, 64, 8),
    ("outputs", "vector", 2): Config(64, 64, 4),
    ("gradients", "scalar", 2): Config(32, 32, 8),
    ("gradients", "vector", 2): Config(32, 32, 4),
    ("states", "scalar", 4): Config(32, 32, 8),
    ("states", "vector", 4): Config(32, 32, 8),
    ("outputs", "scalar", 4): Config(16, 32, 8),
    ("outputs", "vector", 4): Config(32, 32, 4),
    ("gradients", "scalar", 4): Config(16, 16, 16),
    ("gradients", "vector", 4): Config(32, 32, 4),
    ("gradients", "none", 4): Config(16, 16, 8),
}
# Where sm_80 needs smaller blocks.
_SMALLER = {
    ("states", "scalar", 2): Config(32, 32, 8),
    ("outputs", "scalar", 2): Config(32, 64, 8),
    ("gradients", "scalar", 2): Config(32, 16, 8),
    ("gradients", "scalar", 4): Config(16, 16, 8),
}


def config(kernel: str, gate: str, size: int, arch: int) -> Config:
    """The launch of a kernel for elements of so many bytes on a compute capability."""
    key = (kernel, gate, size)
    if key not in CONFIGS:  # without decays as with scalar ones
        key = (kernel, "scalar", size)
    return _SMALLER.get(key, CONFIGS[key]) if arch < 90 else CONFIGS[key]


@dataclass(frozen=True)
class Plan:
    """Where the chunks are; see the kernels' docstring.

    Attributes:
        size: Steps of a chunk.
        table: Batch row, first token and count of each chunk, int32 `[N, 3]`.
        spans: First chunk and number of chunks of each sequence, int32 `[S, 2]`.
        step: 1, or -1 reversed.
    """

    size: int
    table: Tensor
    spans: Tensor
    step: int


def plan(x: Tensor, cu_seqlens: Tensor | None, size: int, reverse: bool) -> Plan:
    """Cut the sequences of `[B, L, ...]` into chunks, without waiting for the device."""
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        each = triton.cdiv(length, size)
        chunk = torch.arange(batch * each, device=x.device)
        row, place = chunk // each, chunk % each
        begin, end = torch.zeros_like(row), torch.full_like(row, length)
        first = torch.arange(batch, device=x.device) * each
        counts = torch.full_like(first, each)
    else:
        bounds = cu_seqlens.to(x.device).long()
        counts = (bounds.diff() + size - 1) // size
        ends = counts.cumsum(0)
        first = ends - counts
        chunk = torch.arange(most_chunks(length, len(counts), size), device=x.device)
        sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=len(counts) - 1)
        row, place = torch.zeros_like(chunk), chunk - first[sequence]
        begin, end = bounds[sequence], bounds[sequence + 1]
    count = (end - begin - place * size).clamp(0, size)
    token = end - 1 - place * size if reverse else begin + place * size
    table = torch.stack((row, token, count), 1).int()
    return Plan(size, table, torch.stack((first, counts), 1).int(), -1 if reverse else 1)


def _gate(log_decay: Tensor | None) -> str:
    return "none" if log_decay is None else "vector" if log_decay.dim() == 4 else "scalar"


def _blocks(kernel: str, gate: str, x: Tensor, K: int, V: int) -> tuple[int, int, dict[str, Any]]:
    """Blocks of keys and values, and the launch's options."""
    row = config(kernel, gate, x.element_size(), architecture(x))
    keys, values = (
        min(most, max(16, triton.next_power_of_2(n))) for most, n in ((row.keys, K), (row.values, V))
    )
    warps = _warps(kernel, row, keys, values)
    options = {"BLOCK_K": keys, "BLOCK_V": values, "num_warps": warps, "num_stages": 2}
    return triton.cdiv(K, keys), triton.cdiv(V, values), options


def _warps(kernel: str, row: Config, keys: int, values: int) -> int:
    """Narrow states leave nothing to do for many warps."""
    return min(row.warps, 4) if kernel == "states" and keys * values <= 256 else row.warps


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 or x.dim() == 3 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _scan_states(
    x: Tensor, y: Tensor, decay: Tensor | None, start: Tensor | None, chunks: Plan, scale: float, back: bool
) -> tuple[Tensor, Tensor]:
    """The states before all chunks, `[N, H, K, V]`, and the last ones, `[S, H, K, V]`."""
    heads, K, V = y.shape[2], x.shape[3], y.shape[3]
    states = torch.empty(len(chunks.table), heads, K, V, dtype=torch.float32, device=x.device)
    last = torch.empty(len(chunks.spans), heads, K, V, dtype=torch.float32, device=x.device)
    gate = _gate(decay)
    keys, values, options = _blocks("states", gate, x, K, V)
    start = None if start is None else start.contiguous()
    states_kernel[(keys * values, len(chunks.spans), heads)](
        x, y, decay, start, states, last, chunks.table, chunks.spans,
        *_strides(x), *_strides(y), *_strides(decay), heads // x.shape[2], K, V, scale, chunks.step,
        GATE=gate, BACKWARD=back, C=chunks.size, **options,
    )  # fmt: skip
    return states, last


def _read_states(
    q: Tensor,
    k: Tensor,
    y: Tensor,
    decay: Tensor | None,
    states: Tensor,
    chunks: Plan,
    scale: float,
    back: bool,
) -> Tensor:
    """The outputs, or (back) the gradient of v, both `[B, L, H, V]`."""
    heads, K, V = y.shape[2], q.shape[3], y.shape[3]
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    gate = _gate(decay)
    _, values, options = _blocks("outputs", gate, q, K, V)
    outputs_kernel[(len(chunks.table), heads, values)](
        q, k, y, decay, states, out, chunks.table,
        *_strides(q), *_strides(k), *_strides(y), *_strides(decay), *_strides(out),
        heads // q.shape[2], K, V, scale, chunks.step,
        GATE=gate, BACKWARD=back, C=chunks.size, **options,
    )  # fmt: skip
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences; arguments and results as `cpu.forward`, but states are `[N, H, K, V]`."""
    q, k, v, log_decay = (_dense(x) for x in (q, k, v, log_decay))  # type: ignore[assignment]
    chunks = plan(v, cu_seqlens, chunk_size(log_decay), reverse)
    states, last = _scan_states(k, v, log_decay, initial_state, chunks, 1.0, False)
    return _read_states(q, k, v, log_decay, states, chunks, scale, False), last, states


def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    scale: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Pull the gradients of out and last back; arguments and results as `cpu.backward`."""
    grad, q, k, v, log_decay = (_dense(x) for x in (grad, q, k, v, log_decay))  # type: ignore[assignment]
    chunks = plan(v, cu_seqlens, chunk_size(log_decay), reverse)
    pulls, first = _scan_states(q, grad, log_decay, grad_last, chunks, scale, True)
    dv = _read_states(q, k, grad, log_decay, pulls, chunks, scale, True)
    (batch, length, heads), K, V = v.shape[:3], q.shape[3], v.shape[3]
    gate = _gate(log_decay)
    keys, _, options = _blocks("gradients", gate, q, K, V)
    dq, dk = (torch.empty(batch, length, heads, K, dtype=torch.float32, device=q.device) for _ in range(2))
    ddecay = None
    if log_decay is not None:
        shape = log_decay.shape if gate == "vector" else (keys, *log_decay.shape)
        ddecay = torch.empty(shape, dtype=torch.float32, device=q.device)
    gradients_kernel[(len(chunks.table), heads, keys)](
        grad, q, k, v, log_decay, states, pulls, dq, dk, ddecay, chunks.table,
        *_strides(grad), *_strides(q), *_strides(k), *_strides(v), *_strides(log_decay),
        batch * length, length, heads // q.shape[2], K, V, scale, chunks.step,
        GATE=gate, C=chunks.size, **options,
    )  # fmt: skip
    if log_decay is not None and ddecay is not None:
        ddecay = (ddecay if gate == "vector" else ddecay.sum(0)).to(log_decay.dtype)
    return _of_groups(dq, q), _of_groups(dk, k), dv, ddecay, first


def _of_groups(grad: Tensor, x: Tensor) -> Tensor:
    """Sum over the heads that share x's."""
    if grad.shape != x.shape:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    return grad.to(x.dtype)


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles.

    Every launch of the table at full blocks, both ways; the quick gate has half precision, scalar decays both
    ways and the gradients' kernel. Narrow heads (blocks of 16) and unaligned strides are in the slow one.
    """
    found = []
    passes = [("states", False), ("states", True), ("outputs", False), ("outputs", True), ("gradients", True)]
    for arch, (kernel, back), gate, dtype in itertools.product(
        ARCHITECTURES, passes, ("scalar", "vector", "none"), ("fp16", "fp32")
    ):
        for aligned, narrow in ((True, False), (False, False), (True, True)):
            row = config(kernel, gate, 2 if dtype == "fp16" else 4, arch)
            if narrow and (gate == "none" or row.keys == row.values == 16):
                continue
            quick = dtype == "fp16" and gate == "scalar" and aligned and not narrow
            quick |= kernel == "gradients" and dtype == "fp16" and gate == "vector" and aligned and not narrow
            found.append(_variant(kernel, gate, dtype, arch, back, aligned, narrow, not quick))
    return found


def _variant(
    kernel: str, gate: str, dtype: str, arch: int, back: bool, aligned: bool, narrow: bool, slow: bool
) -> Variant:
    function = {"states": states_kernel, "outputs": outputs_kernel, "gradients": gradients_kernel}[kernel]
    row = config(kernel, gate, 2 if dtype == "fp16" else 4, arch)
    size = 16 if gate == "vector" else 64
    keys, values = (16, 16) if narrow else (row.keys, row.values)
    constants: dict[str, bool | int | str | None] = {
        "GATE": gate, "C": size, "BLOCK_K": keys, "BLOCK_V": values,
    }  # fmt: skip
    if kernel != "gradients":
        constants["BACKWARD"] = back
    if gate == "none":
        constants |= {"decay": None} | ({"ddecay": None} if kernel == "gradients" else {})
    names = [p.name for p in function.params]
    strides = [n for n in names if n.endswith(("_batch", "_token", "_head"))]
    whole = [*strides, "K", "V", "shared", "step", "tokens", "length"]
    fp32 = ("decay", "start", "states", "last", "pulls", "dq", "dk", "ddecay")
    signature = (
        dict.fromkeys(names, f"*{dtype}")
        | dict.fromkeys(fp32, "*fp32")
        | {"table": "*i32", "spans": "*i32", "scale": "fp32"}
        | dict.fromkeys(whole, "i32")
    )
    gated = () if gate == "none" else ("g_batch", "g_token")
    own = tuple(n for n in strides if not n.startswith("g_")) + (("g_head",) if gate == "vector" else ())
    return Variant(
        kernel=f"{function.__module__}:{function.__name__}",
        signature={n: signature[n] for n in names},
        constants=constants,
        arch=arch,
        label=f"{dtype} {gate} {'back' if back else 'ahead'} {size}: {keys}x{values}",
        divisible=(*own, *gated, "K", "V") if aligned else (),
        num_warps=_warps(kernel, row, keys, values),
        num_stages=2,
        tensor_cores=dtype == "fp16",
        slow=slow,
    )
