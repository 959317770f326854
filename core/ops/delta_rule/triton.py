"""Launches of the delta rule's Triton kernels: forward, backward, the gate's list."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.ops.delta_rule import cpu
from manyheads.core.ops.delta_rule import triton_kernels as kernels
from manyheads.core.ops.launches import architecture, padded

_C = cpu.SIZE
_DIMS = (16, 32, 64)  # padded widths of keys; with 128 a state and its neighbours do not fit the registers


class Config(NamedTuple):
    """A launch: value channels at a time, warps, key channels at a time (0: all of them), and stages.

    A chunk's tiles fill the registers; nothing is left to load ahead into.
    """

    block_v: int
    warps: int
    keys: int = 0
    stages: int = 1


# By the padded width of the keys.
_TABLE: dict[str, dict[int, Config]] = {
    "prepare_kernel": {16: Config(32, 4), 32: Config(32, 4), 64: Config(32, 8)},
    "state_kernel": {16: Config(32, 4), 32: Config(16, 4), 64: Config(16, 8)},
    "output_kernel": dict.fromkeys(_DIMS, Config(32, 4)),
    "pull_output_kernel": dict.fromkeys(_DIMS, Config(32, 4)),
    "pull_state_kernel": {16: Config(16, 2), 32: Config(16, 8), 64: Config(16, 4)},
    "pair_kernel": dict.fromkeys(_DIMS, Config(32, 8, 32)),
    "gradient_kernel": {16: Config(16, 8), 32: Config(16, 8), 64: Config(32, 8)},
}


# Exceptions, by (kernel, width, whether the inputs are float32, architecture): the first that spills nothing.
_EXCEPTIONS = {
    ("output_kernel", 64, True, 90): Config(32, 8),
    ("output_kernel", 64, True, 80): Config(32, 8),
    ("pull_state_kernel", 64, False, 90): Config(16, 4, stages=2),
    ("pull_state_kernel", 64, True, 90): Config(16, 8),
    ("pull_state_kernel", 64, False, 80): Config(16, 8),
    ("pull_state_kernel", 64, True, 80): Config(16, 16),
    ("gradient_kernel", 32, True, 90): Config(16, 4),
    ("gradient_kernel", 32, True, 80): Config(16, 4),
}


def config(kernel: str, block: int, single: bool, arch: int) -> Config:
    """How a kernel is launched for keys of padded width `block` and inputs in float32 (single) or less."""
    return _EXCEPTIONS.get((kernel, block, single, arch), _TABLE[kernel][block])


# Kernels whose programs are for a block of value channels each.
_BY_VALUES = ("state_kernel", "output_kernel", "pull_output_kernel", "pull_state_kernel")


class _Chunks(NamedTuple):
    """Where chunks lie, one sequence's after the other's: first row and length of each, first of each one."""

    begin: Tensor
    length: Tensor
    starts: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences; arguments and results as `cpu.forward`."""
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    chunks = _cut(q, cu_seqlens)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    count, sequences = chunks.begin.shape[0], chunks.starts.shape[0] - 1
    single = {"dtype": torch.float32, "device": q.device}
    state = torch.empty(sequences, heads, key_dim, value_dim, **single)  # type: ignore[call-overload]
    kept = torch.zeros(count, heads, key_dim, value_dim, **single)  # type: ignore[call-overload]
    written = torch.empty(count, heads, _C, value_dim, **single)  # type: ignore[call-overload]
    inverse = torch.empty(count, heads, _C, _C, **single)  # type: ignore[call-overload]
    initial = None if initial_state is None else initial_state.contiguous()
    q, k, v, beta, log_decay = _flat(q), _flat(k), _flat(v), _gate(beta), _gate(log_decay)
    kv = *_strides(k), *_strides(v), heads, key_dim, value_dim
    at = chunks.begin, chunks.length
    _run(
        kernels.prepare_kernel, (count, heads), q, key_dim, k, v, beta, log_decay, *at, inverse, None, None,
        *kv,
    )  # fmt: skip
    _run(
        kernels.state_kernel, (sequences * heads, value_dim), q, key_dim,
        k, v, beta, log_decay, *chunks, inverse, initial, kept, written, state, *kv,
    )  # fmt: skip
    _run(
        kernels.output_kernel, (count, heads, value_dim), q, key_dim, q, k, beta, log_decay, *at, kept,
        written, out, *_strides(q), *_strides(k), heads, key_dim, value_dim, scale,
    )  # fmt: skip
    return out, state, kept if keep else kept.new_empty(0, *kept.shape[1:])


def backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state (float32); as `cpu.backward`."""
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    chunks = _cut(q, cu_seqlens)
    dq, dk, dv, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, beta))
    ddecay = None if log_decay is None else torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    count, sequences = chunks.begin.shape[0], chunks.starts.shape[0] - 1
    after, written = torch.empty_like(kept), kept.new_empty(count, heads, _C, value_dim)
    pulled, inverse = torch.empty_like(written), kept.new_empty(count, heads, _C, _C)
    dinitial = kept.new_empty(sequences, heads, key_dim, value_dim)
    dstate = None if dstate is None else dstate.contiguous()
    q, k, v, dout, beta, log_decay = _flat(q), _flat(k), _flat(v), _flat(dout), _gate(beta), _gate(log_decay)
    sizes = heads, key_dim, value_dim
    at, qk = (chunks.begin, chunks.length), (*_strides(q), *_strides(k))
    _run(
        kernels.prepare_kernel, (count, heads), q, key_dim, k, v, beta, log_decay, *at, inverse, kept,
        written, *_strides(k), *_strides(v), *sizes,
    )  # fmt: skip
    _run(
        kernels.pull_output_kernel, (count, heads, value_dim), q, key_dim,
        dout, q, k, beta, log_decay, *at, pulled, *_strides(dout), *qk, *sizes, scale,
    )  # fmt: skip
    _run(
        kernels.pull_state_kernel, (sequences * heads, value_dim), q, key_dim,
        dout, q, k, beta, log_decay, *chunks, inverse, dstate, after, pulled, dinitial,
        *_strides(dout), *qk, *sizes, scale,
    )  # fmt: skip
    dqueries, dkeys = kept.new_empty(2, count, heads, _C, key_dim)
    dgates = kept.new_empty(2, count, heads, _C)
    _run(
        kernels.pair_kernel, (count, heads), q, key_dim,
        dout, q, k, v, beta, log_decay, *at, written, pulled, dv, dqueries, dkeys, dgates,
        *_strides(dout), *qk, *_strides(v), *sizes, scale,
    )  # fmt: skip
    _run(
        kernels.gradient_kernel, (count, heads), q, key_dim,
        dout, q, k, beta, log_decay, *at, kept, written, after, pulled, dqueries, dkeys, dgates,
        dq, dk, dbeta, ddecay, *_strides(dout), *qk, *sizes, scale,
    )  # fmt: skip
    return dq, dk, dv, dbeta, ddecay, dinitial


def _run(kernel: Any, grid: tuple[int, ...], q: Tensor, key_dim: int, *arguments: Any) -> None:
    """Launch a kernel; a grid's last axis in channels becomes one in blocks of them."""
    block_k = padded(key_dim)
    launch = config(kernel.__name__, block_k, q.dtype == torch.float32, architecture(q))
    if kernel.__name__ in _BY_VALUES:
        grid = (*grid[:-1], triton.cdiv(grid[-1], launch.block_v))
    kernel[grid](
        *arguments,
        C=_C,
        BLOCK_K=launch.keys or block_k,
        BLOCK_V=launch.block_v,
        PRECISION=_precision(q.dtype == torch.float32),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def _precision(single: bool) -> str:
    # States stay float32 whatever the inputs are: on tensor cores three products of 19-bit floats make one.
    return "ieee" if single else "tf32x3"


def _cut(q: Tensor, cu_seqlens: Tensor | None) -> _Chunks:
    """Lay out the chunks without looking at the values of cu_seqlens: some at the end may have no length."""
    (batch, length), device = q.shape[:2], q.device
    equal = torch.arange(batch + 1, device=device) * length
    bounds = equal if cu_seqlens is None else cu_seqlens.long()
    lengths = bounds.diff()
    starts = torch.zeros_like(bounds)
    starts[1:] = ((lengths + _C - 1) // _C).cumsum(0)
    chunk = torch.arange(cpu.rows(q, cu_seqlens), device=device)
    sequence = torch.searchsorted(starts[1:], chunk, right=True).clamp(max=lengths.shape[0] - 1)
    step = (chunk - starts[sequence]) * _C
    left = (lengths[sequence] - step).clamp(0, _C)
    return _Chunks((bounds[sequence] + step).int(), left.int(), starts.int())


def _flat(x: Tensor) -> Tensor:
    """Tokens of all sequences in line, `[T, H, D]`, with a dense last axis."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _gate(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def aot_variants() -> list[Variant]:
    """List what the ahead-of-time gate compiles: each width of the keys, gated or not.

    The gated form in bfloat16 with 64 key channels is the quick gate's.
    """
    found = []
    for arch, block, dtype, gated, aligned in itertools.product(
        ARCHITECTURES, _DIMS, ("bf16", "fp32"), (True, False), (True, False)
    ):
        slow = (block, dtype, gated, aligned) != (64, "bf16", True, True)
        for name in _TABLE:
            for backward_too in (False, True) if name == "prepare_kernel" else (False,):
                found.append(_variant(name, arch, block, dtype, gated, aligned, backward_too, slow))
    return found


def _variant(
    name: str, arch: int, block: int, dtype: str, gated: bool, aligned: bool, backward_too: bool, slow: bool
) -> Variant:
    names = getattr(kernels, name).arg_names
    launch = config(name, block, dtype == "fp32", arch)
    sizes = [n for n in names if n.endswith(("_token", "_head", "_dim")) or n == "heads"]
    single = (
        "initial",
        "kept",
        "written",
        "final",
        "inverse",
        "dfinal",
        "after",
        "pulled",
        "dinitial",
        "dqueries",
        "dkeys",
        "dgates",
    )
    types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(sizes, "i32") | dict.fromkeys(single, "*fp32")
    types |= dict.fromkeys(("begin", "length", "chunks"), "*i32") | {"scale": "fp32"}
    constants: dict[str, bool | int | str | None] = {
        "C": _C,
        "BLOCK_K": launch.keys or block,
        "BLOCK_V": launch.block_v,
        "PRECISION": _precision(dtype == "fp32"),
    }
    if not gated:
        constants |= {n: None for n in ("log_decay", "ddecay") if n in names}
    if name == "prepare_kernel" and not backward_too:
        constants |= {"kept": None, "written": None}
    return Variant(
        kernel=f"{kernels.__name__}:{name}",
        signature={n: types[n] for n in names if n not in constants},
        constants=constants,
        arch=arch,
        label=f"{dtype} K{block}{' gated' if gated else ''}{' back' if backward_too else ''}",
        divisible=tuple(sizes) if aligned else (),
        num_warps=launch.warps,
        num_stages=launch.stages,
        tensor_cores=dtype == "bf16" and (name != "prepare_kernel" or backward_too),
        slow=slow,
    )
