"""Launches the Triton kernels of packed attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton as tr
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.dispatch import interpreting
from manyheads.core.ops.attention.triton_configs import HEAD_DIMS, Config
from manyheads.core.ops.launches import LOG2E, architecture, dense, padded
from manyheads.core.ops.varlen_attention import triton_kernels as kernels
from manyheads.core.ops.varlen_attention.triton_configs import CONFIGS

# Partial sums of the bias's gradient: enough programs to fill a GPU of 132 processors twice.
PROGRAMS = 264
# In the interpreter an operation costs the same whatever its size: few large blocks.
INTERPRETED = Config(64, 64, 4, 1)


class Call(NamedTuple):
    """One call's tensors, with what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    bias: Tensor | None
    causal: bool
    scale: float

    @property
    def far(self) -> int:
        """The largest distance of the table."""
        return 0 if self.bias is None else self.bias.shape[1] // 2

    def slots(self, keys: bool, block: int) -> int:
        """How many programs a head needs so that every sequence surely has its blocks (README.md)."""
        return len(self.k if keys else self.q) // block + len(self.cu_q) - 1

    def pointers(self) -> tuple[Tensor, ...]:
        """The inputs in the kernels' order; an absent bias is any tensor, as no kernel reads it."""
        return (*self[:5], self.q if self.bias is None else self.bias)

    def numbers(self, grad: Tensor | None = None) -> tuple[float, ...]:
        """Strides in the kernels' order, then sequences, heads, heads a group, the table's reach, scale."""
        tensors = (self.q, self.k, self.v) if grad is None else (self.q, self.k, self.v, grad)
        strides = [n for x in tensors for n in x.stride()[:2]]
        strides.append(0 if self.bias is None else self.bias.stride(0))
        heads = self.q.shape[1]
        counts = (len(self.cu_q) - 1, heads, heads // self.k.shape[1], self.far)
        return (*strides, *counts, self.scale * LOG2E)

    def config(self, kernel: str) -> Config:
        """The launch of a kernel; a GPU that is not in the table takes the row of the one below it."""
        if interpreting():
            return INTERPRETED
        bits = 32 if self.q.dtype == torch.float32 else 16
        return CONFIGS[kernel, architecture(self.q), bits][padded(self.q.shape[-1])]

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time constants and launch options."""
        return {
            "D": self.q.shape[-1],
            "BLOCK_D": padded(self.q.shape[-1]),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_BIAS": self.bias is not None,
            "CAUSAL": self.causal,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> Call:
    """Kernels take any strides but a last one of 1."""
    q, k, v = (dense(x) for x in (q, k, v))
    return Call(
        q, k, v, cu_q.contiguous(), cu_k.contiguous(), None if bias is None else dense(bias), causal, scale
    )


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, **constants)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output `[Tq, H, D]` and what the backward needs of each row, `[Tq, H, 2]`.

    That is the largest base-2 score, and one over the sum of the exponentials.
    """
    call = _call(q, k, v, cu_q, cu_k, bias, causal, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.empty((*q.shape[:2], 2), dtype=torch.float32, device=q.device)
    config = call.config("forward")
    programs = call.slots(False, config.block_m) * q.shape[1]
    _launch(
        kernels.forward_kernel,
        programs,
        *call.pointers(),
        out,
        rows,
        *call.numbers(),
        **call.constants(config),
    )
    return out, rows


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Tensor,
    causal: bool,
    scale: float,
    *,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of bias where needed."""
    call = _call(q, k, v, cu_q, cu_k, bias, causal, scale)
    grad = dense(grad)
    tokens, heads, dim = q.shape
    delta = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    _launch(
        kernels.delta_kernel, tr.cdiv(tokens, 64) * heads,
        grad, out, delta, *grad.stride()[:2], heads, tokens, D=dim, BLOCK_D=padded(dim), BLOCK_M=64,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs, numbers = (*call.pointers(), grad, rows, delta), call.numbers(grad)
    config = call.config("query")  # first: it corrects delta
    programs = call.slots(False, config.block_m) * heads
    _launch(kernels.query_kernel, programs, *inputs, dq, *numbers, **call.constants(config))
    config = call.config("key")
    programs = call.slots(True, config.block_n) * k.shape[1]
    _launch(kernels.key_kernel, programs, *inputs, dk, dv, *numbers, **call.constants(config))
    dbias = _relative(call, inputs, numbers, bias) if needs_bias and bias is not None else None
    return dq, dk, dv, dbias


def _relative(call: Call, inputs: tuple[Tensor, ...], numbers: tuple[float, ...], bias: Tensor) -> Tensor:
    """The gradient of the table: sums along block diagonals, put together without atomics."""
    config = call.config("relative")
    constants = call.constants(config)
    block, far, heads = constants["BLOCK_M"], call.far, bias.shape[0]
    constants.pop("BLOCK_N")
    reach = tr.cdiv(far, block) + 1
    width, slots = 2 * reach + 1, call.slots(False, block)
    if slots == 0:
        return torch.zeros_like(bias)
    steps = tr.cdiv(slots, max(1, min(slots, PROGRAMS // (width * heads))))
    splits = tr.cdiv(slots, steps)
    sums = torch.empty((splits, heads, width, 2, block), dtype=torch.float32, device=bias.device)
    _launch(
        kernels.relative_kernel, width * heads * splits, *inputs, sums, *numbers, slots, steps, **constants
    )
    after, before = sums.sum(0).unbind(2)  # [H, width, block]
    # By distance, from -(reach + 1) * block on: a diagonal's second half lies on the first of the one before.
    line = torch.zeros((heads, (width + 1) * block), dtype=torch.float32, device=bias.device)
    line[:, block:] += after.flatten(1)
    line[:, :-block] += before.flatten(1)
    zero = (reach + 1) * block
    found = line[:, zero - far : zero + far + 1].clone()
    found[:, 0] += line[:, : zero - far].sum(1)
    found[:, -1] += line[:, zero + far + 1 :].sum(1)
    return found.to(bias.dtype)


_MODULE = "manyheads.core.ops.varlen_attention.triton_kernels"
# Strides of q, k, v and the gradient are multiples of the head dim; a table's width is odd.
_POINTERS = ("Q", "K", "V", "Grad", "Out", "DQ", "DK", "DV", "Bias")
_FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bias": ("HAS_BIAS",),
    "causal": ("CAUSAL",),
    "causal bias": ("HAS_BIAS", "CAUSAL"),
}


def aot_variants() -> Iterator[Variant]:
    """List the kernels as they are launched: every row of the table, by dtype, features and alignment.

    The quick gate takes float16 with a bias at head dim 64, aligned and not; the rest is slow.
    """
    for (kernel, arch, bits), dims in CONFIGS.items():
        dtypes = ("fp32",) if bits == 32 else ("fp16", "bf16")
        for dim, dtype, features, aligned in product(dims, dtypes, _FEATURES, (True, False)):
            if kernel != "relative" or "bias" in features:
                yield variant(kernel, arch, dtype, dim, features, aligned)
    for arch, dim in product(ARCHITECTURES, HEAD_DIMS):
        yield _delta_variant(arch, dim)


def variant(
    kernel: str, arch: int, dtype: str, dim: int, features: str, aligned: bool, config: Config | None = None
) -> Variant:
    """One kernel as a row of the table launches it, or as `config` would."""
    config = config or CONFIGS[kernel, arch, 32 if dtype == "fp32" else 16][dim]
    names = [p.name for p in getattr(kernels, f"{kernel}_kernel").params]
    constants: dict[str, bool | int] = {x: x in _FEATURES[features] for x in ("HAS_BIAS", "CAUSAL")}
    constants |= {"D": dim, "BLOCK_D": dim, "BLOCK_M": config.block_m}
    if kernel != "relative":
        constants["BLOCK_N"] = config.block_n
    strides = [n for n in names if n.startswith("stride")]
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(_POINTERS, f"*{dtype}")
    signature |= {"CuQ": "*i32", "CuK": "*i32", "Rows": "*fp32", "Delta": "*fp32", "DB": "*fp32"}
    signature |= {"qk_scale": "fp32"}
    shape = f"{dtype} D{dim} {config.block_m}x{config.block_n}"
    quick = features == "bias" and (dtype, dim) == ("fp16", 64) and (aligned or arch == 90)
    return Variant(
        kernel=f"{_MODULE}:{kernel}_kernel",
        signature=signature,
        constants=constants,
        arch=arch,
        label=f"{shape} {features} {'aligned' if aligned else 'odd'}",
        divisible=tuple(n for n in strides if n != "stride_bh") if aligned else (),
        num_warps=config.warps,
        num_stages=config.stages,
        tensor_cores=dtype != "fp32",
        slow=not quick,
    )


def _delta_variant(arch: int, dim: int) -> Variant:
    names = [p.name for p in kernels.delta_kernel.params]
    return Variant(
        kernel=f"{_MODULE}:delta_kernel",
        signature=dict.fromkeys(names, "i32") | {"Grad": "*bf16", "Out": "*bf16", "Delta": "*fp32"},
        constants={"D": dim, "BLOCK_D": dim, "BLOCK_M": 64},
        arch=arch,
        label=f"bf16 D{dim}",
        divisible=tuple(n for n in names if n.startswith("stride")),
        slow=dim != 64,
    )
