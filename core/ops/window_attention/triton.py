"""Launches the Triton kernels of window attention: forward, backward, and what the gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton as tr
from torch import Tensor

from manyheads.core.aot import Variant
from manyheads.core.dispatch import interpreting
from manyheads.core.ops.attention.triton_configs import Config
from manyheads.core.ops.launches import LOG2E, architecture, dense, padded
from manyheads.core.ops.window_attention import triton_kernels as kernels
from manyheads.core.ops.window_attention.geometry import Geometry, layout
from manyheads.core.ops.window_attention.triton_configs import CONFIGS, SHORT

BITS = 15  # of x and of y in the kernels' table
# Programs of a sum over windows: enough to fill a GPU of 132 processors four times (small tiles), or twice.
MANY, FEW = 528, 264

# In the interpreter an operation costs the same whatever its size: few large blocks.
INTERPRETED = Config(64, 64, 4, 1)


class Call(NamedTuple):
    """One call's tensors, with what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    where: Geometry
    scale: float

    @property
    def pack(self) -> int:
        """Windows that a tile of SHORT rows holds, at least one."""
        return max(1, SHORT // self.where.tokens)

    def config(self, kernel: str) -> Config | None:
        """The launch of a kernel; a GPU not in the table takes the row of the architecture below it."""
        if interpreting():
            return INTERPRETED
        bits = 32 if self.q.dtype == torch.float32 else 16
        return CONFIGS[kernel, architecture(self.q), bits].get(padded(self.q.shape[-1]))

    def pointers(self) -> list[Tensor]:
        """The inputs in the kernels' order; an absent bias is any tensor, as no kernel reads it."""
        bias = self.q if self.bias is None else self.bias
        return [self.q, self.k, self.v, bias, _places(self.where, self.q.device)]

    def numbers(self, grad: Tensor | None = None) -> list[float]:
        """Strides, sizes, the scale in base 2."""
        strides: list[int] = []
        for x in (self.q, self.k, self.v, *([] if grad is None else [grad])):
            strides += x.stride()[:4]
        strides += (0, 0, 0) if self.bias is None else self.bias.stride()
        where = self.where
        sizes = (where.height * where.width, where.width, self.q.shape[3], where.tokens, where.windows)
        return [*strides, *sizes, self.scale * LOG2E]

    def constants(self, config: Config, *, one_block: bool = False) -> dict[str, Any]:
        """Compile-time constants and launch options."""
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return {
            "D": self.q.shape[-1],
            "BLOCK_D": padded(self.q.shape[-1]),
            **({"BLOCK": config.block_m} if one_block else blocks),
            "HAS_BIAS": self.bias is not None,
            "SHIFTED": self.where.shifted,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


@lru_cache(maxsize=64)
def _places(where: Geometry, device: torch.device) -> Tensor:
    """The kernels' table `[windows, n]`, int32: x, y and the side of the cuts, in BITS, BITS and two bits.

    Raises:
        ValueError: The image is too large for the table.
    """
    if max(where.height, where.width) >= 1 << BITS:
        raise ValueError(
            f"window_attention: the kernels take images of fewer than {1 << BITS} rows and columns"
        )
    found = layout(where)
    y, x = found.places // where.width, found.places % where.width
    code = x + (y << BITS) + (found.region.long() << 2 * BITS)
    return code.to(torch.int32).to(device)  # the side may reach into the sign


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, where: Geometry, scale: float) -> Call:
    return Call(dense(q), dense(k), dense(v), bias, where, scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, where: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, W, heads, D]` and what the backward needs of each row.

    That is `[B, heads, H * W, 2]`: the largest base-2 score, and one over the sum of the exponentials.
    """
    call = _call(q, k, v, bias, where, scale)
    batch, height, width, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = torch.empty((batch, heads, height * width, 2), dtype=torch.float32, device=q.device)
    pack = call.pack
    config = call.config("short" if where.tokens <= SHORT else "forward")
    assert config is not None
    if config.block_m < SHORT:  # a tile of so few rows holds no pack
        pack = 1
    grid = (batch * heads * tr.cdiv(where.windows, pack) * tr.cdiv(pack * where.tokens, config.block_m),)
    kernels.forward_kernel[grid](
        *call.pointers(), out, rows, *call.numbers(), pack, **call.constants(config), PACKED=pack > 1
    )  # fmt: skip
    return out, rows


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Tensor,
    where: Geometry,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of the bias `[heads, n, n]` in float32 where it is needed."""
    call, grad = _call(q, k, v, bias, where, scale), dense(grad)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grads = (dq, dk, dv)
    config = call.config("small") if where.tokens <= SHORT else None
    if config is not None and config.block_m >= SHORT:
        return dq, dk, dv, _small(call, config, grad, rows, grads, needs_bias)
    _large(call, grad, out, rows, grads)
    return dq, dk, dv, _bias(call, grad, out, rows) if needs_bias else None


def _small(
    call: Call,
    config: Config,
    grad: Tensor,
    rows: Tensor,
    grads: tuple[Tensor, ...],
    needs_bias: bool,
) -> Tensor | None:
    """All gradients in one launch; the bias's as partial sums that are added up in order."""
    heads, n, pack = call.q.shape[3], call.where.tokens, call.pack
    groups = call.q.shape[0] * tr.cdiv(call.where.windows, pack)
    steps = tr.cdiv(groups, max(1, MANY // heads)) if needs_bias else 1
    splits = tr.cdiv(groups, steps)
    shape = (splits if needs_bias else 0, heads, config.block_m, config.block_m)
    partial = torch.empty(shape, dtype=torch.float32, device=grad.device)
    kernels.small_kernel[(heads * splits,)](
        *call.pointers(), rows, grad, *grads, partial, *call.numbers(grad), pack, groups, steps,
        **call.constants(config, one_block=True), PACKED=pack > 1, OF_BIAS=needs_bias,
    )  # fmt: skip
    if not needs_bias:
        return None
    total = partial.sum(0)  # [heads, block, block]: windows of a pack one after the other on the diagonal
    return torch.stack([total[:, i : i + n, i : i + n] for i in range(0, pack * n, n)]).sum(0)


def _large(call: Call, grad: Tensor, out: Tensor, rows: Tensor, grads: tuple[Tensor, ...]) -> None:
    """The gradients of q, k and v of windows of several blocks."""
    inputs, numbers = (*call.pointers(), out, rows, grad), call.numbers(grad)
    each = call.q.shape[0] * call.where.windows * call.q.shape[3]
    config = call.config("key")
    assert config is not None
    kernels.key_kernel[(each * tr.cdiv(call.where.tokens, config.block_n),)](
        *inputs, grads[1], grads[2], *numbers, **call.constants(config)
    )
    config = call.config("query")
    assert config is not None
    kernels.query_kernel[(each * tr.cdiv(call.where.tokens, config.block_m),)](
        *inputs, grads[0], *numbers, **call.constants(config)
    )


def _bias(call: Call, grad: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the bias: its tiles, each summed over all windows in a few splits."""
    config = call.config("bias")
    assert config is not None
    heads, n = call.q.shape[3], call.where.tokens
    tiles = heads * tr.cdiv(n, config.block_m) * tr.cdiv(n, config.block_n)
    total = call.q.shape[0] * call.where.windows
    steps = tr.cdiv(total, max(1, FEW // tiles))
    splits = tr.cdiv(total, steps)
    partial = torch.empty((splits, heads, n, n), dtype=torch.float32, device=grad.device)
    kernels.bias_kernel[(tiles * splits,)](
        *call.pointers(), out, rows, grad, partial, *call.numbers(grad), total, steps,
        **call.constants(config),
    )  # fmt: skip
    return partial.sum(0)


_MODULE = "manyheads.core.ops.window_attention.triton_kernels"
_POINTERS = ("Q", "K", "V", "Bias", "Out", "Grad", "DQ", "DK", "DV")


def aot_variants() -> Iterator[Variant]:
    """List the kernels as they are launched: every row of the table, by dtype, features and alignment.

    A shifted window with a bias holds the most registers and stands for one that is not shifted. The quick
    gate takes it in bfloat16 at head dim 32; the rest is slow.
    """
    for (kernel, arch, bits), dims in CONFIGS.items():
        for dim, features, aligned in product(dims, ("bias shifted", ""), (True, False)):
            if features or kernel != "bias":
                yield variant(kernel, arch, "fp32" if bits == 32 else "bf16", dim, features, aligned)
        for dim in dims:
            if bits == 16:
                yield variant(kernel, arch, "fp16", dim, "bias shifted", True)
            if kernel in ("short", "small") and dims[dim].block_m >= SHORT:
                yield variant(
                    kernel, arch, "fp32" if bits == 32 else "bf16", dim, "bias shifted packed", True
                )


def variant(kernel: str, arch: int, dtype: str, dim: int, features: str, aligned: bool) -> Variant:
    """One kernel as a row of the table launches it."""
    config = CONFIGS[kernel, arch, 32 if dtype == "fp32" else 16][dim]
    name = f"{'forward' if kernel == 'short' else kernel}_kernel"
    constants: dict[str, bool | int] = {"D": dim, "BLOCK_D": dim}
    constants |= {"HAS_BIAS": "bias" in features, "SHIFTED": "shifted" in features}
    names = [p.name for p in getattr(kernels, name).params]
    if kernel == "small":
        constants |= {"BLOCK": config.block_m, "OF_BIAS": "bias" in features}
    else:
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    if "PACKED" in names:
        constants["PACKED"] = "packed" in features
    constants["stride_bn"] = 1  # Triton makes a constant of a stride that is 1: a whole bias's last one is
    # Strides of q, k, v and the gradient are multiples of the head dim; those of a bias follow n, mostly odd.
    strides = [x for x in names if x.startswith("stride") and not x.startswith("stride_b")]
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(_POINTERS, f"*{dtype}")
    signature |= {"Places": "*i32", "Rows": "*fp32", "DBias": "*fp32", "qk_scale": "fp32"}
    quick = (features, dtype, dim) == ("bias shifted", "bf16", 32) and (aligned or kernel == "small")
    return Variant(
        kernel=f"{_MODULE}:{name}",
        signature=signature,
        constants=constants,
        arch=arch,
        label=f"{kernel} {dtype} D{dim} {config.block_m}x{config.block_n} {features or 'plain'}",
        divisible=tuple(strides) if aligned else (),
        num_warps=config.warps,
        num_stages=config.stages,
        tensor_cores=dtype != "fp32",
        slow=not quick,
    )
