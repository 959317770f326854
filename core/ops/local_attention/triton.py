"""Launches the Triton kernels of local attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton as tr
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.dispatch import interpreting
from manyheads.core.ops.attention.triton import weighed_gradient
from manyheads.core.ops.attention.triton_configs import HEAD_DIMS, Config
from manyheads.core.ops.launches import LOG2E, architecture, dense, padded
from manyheads.core.ops.local_attention import triton_kernels as kernels
from manyheads.core.ops.local_attention.reference import marked
from manyheads.core.ops.local_attention.triton_configs import CONFIGS

# In the interpreter an operation costs the same whatever its size: few large blocks.
INTERPRETED = Config(64, 64, 4, 1)


@dataclass(frozen=True)
class Call:
    """One call's tensors, with what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor | None
    flags: Tensor | None
    window: int
    scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor | None,
        mask: Tensor | None,
        window: int,
        scale: float,
    ) -> Call:
        """Flag what takes no part in the band: masked tokens and global ones."""
        flags = None if mask is None else ~mask
        if index is not None:
            index = index.to(torch.int32).contiguous()
            flags = marked(index, q) if flags is None else flags | marked(index, q)
        flags = None if flags is None else flags.contiguous().view(torch.int8)
        return cls(dense(q), dense(k), dense(v), index, flags, window, scale)

    def pointers(self) -> list[Tensor]:
        """The inputs in the kernels' order; an absent one is any tensor, as no kernel reads it."""
        return [self.q, self.k, self.v, *(self.q if x is None else x for x in (self.index, self.flags))]

    def numbers(self, grad: Tensor | None = None) -> list[float]:
        """Strides in the kernels' order, then heads, tokens, global tokens, the window, the scale."""
        tensors = (self.q, self.k, self.v) if grad is None else (self.q, self.k, self.v, grad)
        found: list[float] = [n for x in tensors for n in x.stride()[:3]]
        _, tokens, heads, _ = self.q.shape
        count = 0 if self.index is None else self.index.shape[1]
        return [*found, heads, tokens, count, min(self.window, tokens), self.scale * LOG2E]

    def config(self, kernel: str) -> Config:
        """The launch of a kernel."""
        if interpreting():
            return INTERPRETED
        bits = 32 if self.q.dtype == torch.float32 else 16
        return CONFIGS[kernel, architecture(self.q), bits][padded(self.q.shape[-1])]

    def launch(self, name: str, length: int, arguments: list[Any], *, keys: bool = False) -> None:
        """Launch a kernel: a program for each sequence, head and block of `length`."""
        config = self.config(name)
        block = kernels.FAR.value if name == "far" else (config.block_n if keys else config.block_m)
        programs = self.q.shape[0] * self.q.shape[2] * tr.cdiv(length, block)
        if not programs:
            return
        getattr(kernels, f"{name}_kernel")[(programs,)](
            *self.pointers(), *arguments,
            D=self.q.shape[-1], BLOCK_D=padded(self.q.shape[-1]),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_FAR=self.index is not None, HAS_FLAGS=self.flags is not None,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    top: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and what the backward needs of each row, `[B, H, N, 2]`.

    That is the largest base-2 score, and one over the sum of the exponentials.
    """
    call = Call.of(q, k, v, index, mask, window, scale)
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.empty((batch, heads, tokens, 2), dtype=torch.float32, device=q.device)
    call.launch("forward", tokens, [out, rows, *call.numbers()])
    if call.index is not None and top is not None and top.numel():
        top, count = dense(top), top.shape[1]
        kernels.place_kernel[(batch * count * heads,)](
            call.index, top, out, *top.stride()[:3], heads, tokens, count, D=dim, BLOCK_D=padded(dim)
        )
    return out, rows


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    call = Call.of(q, k, v, index, mask, window, scale)
    grad, tokens = dense(grad), q.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel():
        return dq, dk, dv
    inputs, numbers = [grad, rows, weighed_gradient(grad, out)], call.numbers(grad)
    call.launch("query", tokens, [*inputs, dq, *numbers])
    call.launch("key", tokens, [*inputs, dk, dv, *numbers], keys=True)
    if call.index is not None:  # after the band's kernel, which leaves zeros at the global tokens
        call.launch("far", call.index.shape[1], [*inputs, dk, dv, *numbers])
    return dq, dk, dv


_MODULE = "manyheads.core.ops.local_attention.triton_kernels"
_POINTERS = ("Q", "K", "V", "Grad", "Out", "DQ", "DK", "DV", "Top")
_FEATURES: dict[str, tuple[str, ...]] = {
    "band": (),
    "masked": ("HAS_FLAGS",),
    "global": ("HAS_FAR", "HAS_FLAGS"),
}


def aot_variants() -> Iterator[Variant]:
    """List the kernels as they are launched: every row of the table, by dtype, features and alignment.

    The quick gate takes float16 with global tokens at head dim 64, aligned and not; the rest is slow.
    """
    for (kernel, arch, bits), dims in CONFIGS.items():
        dtypes = ("fp32",) if bits == 32 else ("fp16", "bf16")
        for dim, dtype, features, aligned in product(dims, dtypes, _FEATURES, (True, False)):
            if kernel != "far" or features == "global":
                yield variant(kernel, arch, dtype, dim, features, aligned)
    for arch, dim in product(ARCHITECTURES, HEAD_DIMS):
        yield _place_variant(arch, dim)


def variant(
    kernel: str, arch: int, dtype: str, dim: int, features: str, aligned: bool, config: Config | None = None
) -> Variant:
    """One kernel as a row of the table launches it, or as `config` would."""
    config = config or CONFIGS[kernel, arch, 32 if dtype == "fp32" else 16][dim]
    names = [p.name for p in getattr(kernels, f"{kernel}_kernel").params]
    constants: dict[str, bool | int] = {x: x in _FEATURES[features] for x in ("HAS_FAR", "HAS_FLAGS")}
    constants |= {"D": dim, "BLOCK_D": dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(_POINTERS, f"*{dtype}")
    signature |= {"Index": "*i32", "Flags": "*i8", "Rows": "*fp32", "Delta": "*fp32", "qk_scale": "fp32"}
    shape = f"{dtype} D{dim} {config.block_m}x{config.block_n}"
    quick = features == "global" and (dtype, dim) == ("fp16", 64) and (aligned or arch == 90)
    return Variant(
        kernel=f"{_MODULE}:{kernel}_kernel",
        signature=signature,
        constants=constants,
        arch=arch,
        label=f"{shape} {features} {'aligned' if aligned else 'odd'}",
        divisible=tuple(n for n in names if n.startswith("stride")) if aligned else (),
        num_warps=config.warps,
        num_stages=config.stages,
        tensor_cores=dtype != "fp32",
        slow=not quick,
    )


def _place_variant(arch: int, dim: int) -> Variant:
    names = [p.name for p in kernels.place_kernel.params]
    return Variant(
        kernel=f"{_MODULE}:place_kernel",
        signature=dict.fromkeys(names, "i32") | {"Index": "*i32", "Top": "*bf16", "Out": "*bf16"},
        constants={"D": dim, "BLOCK_D": dim},
        arch=arch,
        label=f"bf16 D{dim}",
        divisible=tuple(n for n in names if n.startswith("stride")),
        slow=dim != 64,
    )
