"""Launches the Triton kernels of attention: forward, backward, and the table of launch configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton as tr
from torch import Tensor

from manyheads.core.aot import ARCHITECTURES, Variant
from manyheads.core.dispatch import interpreting
from manyheads.core.ops.attention import triton_kernels as kernels
from manyheads.core.ops.attention.triton_configs import CONFIGS, HEAD_DIMS, SHORT, Config
from manyheads.core.ops.launches import LOG2E, architecture, dense, padded

# Partial sums of a bias gradient: enough programs to fill a GPU of 132 processors twice.
PROGRAMS = 264


# In the interpreter an operation costs the same whatever its size: few large blocks.
INTERPRETED = Config(64, 64, 4, 1)


def _config(kernel: str, call: Call) -> Config:
    """The launch of a kernel; a GPU that is not in the table takes the row of the architecture below it."""
    if interpreting():
        return INTERPRETED
    if kernel == "forward" and call.shape[2] <= SHORT:
        kernel = "short"
    bits = 32 if call.q.dtype == torch.float32 else 16
    load = "heavy" if call.mask is not None or call.dropout_p else "light"
    return CONFIGS[kernel, architecture(call.q), bits, load][padded(call.q.shape[-1])]


class Call(NamedTuple):
    """One call's tensors, with what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    post: Tensor | None
    seed: Tensor | None
    causal: bool
    scale: float
    sigmoid: bool
    dropout_p: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The scores' shape, `[B, H, Nq, Nk]`."""
        return self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1]

    def pointers(self) -> list[Tensor]:
        """The inputs in the kernels' order; an absent one is any tensor, as no kernel reads it."""
        mask = None if self.mask is None else self.mask.view(torch.int8)
        extras = (self.bias, mask, self.post, self.seed)
        return [self.q, self.k, self.v, *(self.q if x is None else x for x in extras)]

    def strides(self, grad: Tensor | None = None) -> list[int]:
        """Strides in the kernels' order: three each of q, k, v (and the gradient), four of the extras."""
        found: list[int] = []
        for x in (self.q, self.k, self.v, *([] if grad is None else [grad])):
            found += x.stride()[:3]
        for extra in (self.bias, self.mask, self.post):
            found += [0] * 4 if extra is None else extra.expand(self.shape).stride()
        return found

    def scalars(self) -> list[float]:
        """Heads, heads a group, lengths, the scale and log Nk in base 2, dropout."""
        _, heads, nq, nk = self.shape
        group = heads // self.k.shape[2]
        return [heads, group, nq, nk, self.scale * LOG2E, math.log2(nk), self.dropout_p]

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time constants and launch options."""
        return {
            "D": self.q.shape[-1],
            "BLOCK_D": padded(self.q.shape[-1]),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "HAS_BIAS": self.bias is not None,
            "HAS_MASK": self.mask is not None,
            "HAS_POST": self.post is not None,
            "SIGMOID": self.sigmoid,
            "CAUSAL": self.causal,
            "DROPOUT": self.dropout_p > 0,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    sigmoid: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, Nq, H, D]` and what the backward needs of each row (softmax kind only).

    That is `[B, H, Nq, 2]`: the largest base-2 score, and one over the sum of the exponentials.
    """
    call = Call(dense(q), dense(k), dense(v), bias, mask, post_scale, seed, causal, scale, sigmoid, dropout_p)
    batch, heads, nq, _ = call.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    make = torch.zeros if sigmoid else torch.empty
    rows = make((batch, heads, nq, 2), dtype=torch.float32, device=q.device)
    config = _config("forward", call)
    grid = (batch * heads * tr.cdiv(nq, config.block_m),)
    kernels.forward_kernel[grid](
        *call.pointers(), out, rows, *call.strides(), *call.scalars(), **call.constants(config)
    )  # fmt: skip
    return out, rows


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    post_scale: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    rows: Tensor,
    causal: bool,
    scale: float,
    sigmoid: bool,
    dropout_p: float,
    *,
    needs_bias: bool,
    needs_post_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, and of bias and post_scale where needed."""
    call = Call(dense(q), dense(k), dense(v), bias, mask, post_scale, seed, causal, scale, sigmoid, dropout_p)
    grad = dense(grad)
    batch, heads, nq, nk = call.shape
    delta = rows if sigmoid else weighed_gradient(grad, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (*call.pointers(), grad, rows, delta)
    numbers = (*call.strides(grad), *call.scalars())
    config = _config("key", call)
    grid = (batch * k.shape[2] * tr.cdiv(nk, config.block_n),)
    kernels.key_kernel[grid](*inputs, dk, dv, *numbers, **call.constants(config))
    config = _config("query", call)
    grid = (batch * heads * tr.cdiv(nq, config.block_m),)
    kernels.query_kernel[grid](*inputs, dq, *numbers, **call.constants(config))
    dbias = _extra(call, inputs, numbers, bias, of_post=False) if needs_bias and bias is not None else None
    dpost = None
    if needs_post_scale and post_scale is not None:
        dpost = _extra(call, inputs, numbers, post_scale, of_post=True)
    return dq, dk, dv, dbias, dpost


def weighed_gradient(grad: Tensor, out: Tensor) -> Tensor:
    batch, nq, heads, dim = out.shape
    delta = torch.empty((batch, heads, nq), dtype=torch.float32, device=out.device)
    grid = (batch * heads * tr.cdiv(nq, 64),)
    kernels.delta_kernel[grid](
        grad, out, delta, *grad.stride()[:3], heads, nq, D=dim, BLOCK_D=padded(dim), BLOCK_M=64
    )  # fmt: skip
    return delta


def _extra(
    call: Call, inputs: tuple[Tensor, ...], numbers: tuple[float, ...], of: Tensor, of_post: bool
) -> Tensor:
    """The gradient of a bias or scale: tiles, summed over what is broadcast in a few splits."""
    batch, heads, nq, nk = call.shape
    bx, hx, rows, columns = (1,) * (4 - of.dim()) + tuple(of.shape)
    config = _config("extra", call)
    tiles_m, tiles_n = tr.cdiv(nq, config.block_m), tr.cdiv(nk, config.block_n)
    one_row, one_column = rows == 1, columns == 1
    programs = bx * hx * (1 if one_row else tiles_m) * (1 if one_column else tiles_n)
    steps = batch // bx * (heads // hx) * (tiles_m if one_row else 1) * (tiles_n if one_column else 1)
    each = tr.cdiv(steps, max(1, min(steps, PROGRAMS // programs)))
    splits = tr.cdiv(steps, each)
    partial = torch.empty((splits, bx, hx, rows, columns), dtype=torch.float32, device=of.device)
    kernels.extra_kernel[(programs * splits,)](
        *inputs, partial, *numbers, batch, bx, hx, each,
        **call.constants(config), OF_POST=of_post, ONE_ROW=one_row, ONE_COLUMN=one_column,
    )  # fmt: skip
    total = partial.sum(0) if splits > 1 else partial[0]
    return total.view(of.shape).to(of.dtype)


_MODULE = "manyheads.core.ops.attention.triton_kernels"
_FLAGS = ("HAS_BIAS", "HAS_MASK", "HAS_POST", "SIGMOID", "CAUSAL", "DROPOUT")
# What calls look like that reach these kernels, by the load they are tuned for ("row": a bias of the keys).
_FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "light": {"bias": ("HAS_BIAS",), "sigmoid": ("SIGMOID",), "post": ("HAS_POST",), "row": ("HAS_BIAS",)},
    "heavy": {
        "bias+mask": ("HAS_BIAS", "HAS_MASK"),
        "all": ("HAS_BIAS", "HAS_MASK", "HAS_POST", "CAUSAL", "DROPOUT"),
    },
}
# Strides of q, k, v and the gradient are multiples of the head dim; those of a bias, mask or scale follow the
# lengths, and an odd length such as 197 leaves them unaligned.
_OWN = ("stride_q", "stride_k", "stride_v", "stride_g")
_POINTERS = ("Q", "K", "V", "Grad", "Out", "DQ", "DK", "DV", "Bias", "Post")


def aot_variants() -> Iterator[Variant]:
    """List the kernels as they are launched: every row of the table, by dtype, features and alignment.

    The quick gate takes a bias in float16 at head dims 64 and 128 and in float32 at 64; the rest is slow.
    """
    seen = set()  # a "short" row may be the same as the plain one
    for (kernel, arch, bits, load), dims in CONFIGS.items():
        dtypes = ("fp32",) if bits == 32 else ("fp16", "bf16")
        for dim, dtype, features, aligned in product(dims, dtypes, _FEATURES[load], (True, False)):
            made = variant(kernel, arch, dtype, dim, load, features, aligned)
            if (features != "row" or kernel == "extra") and str(made) not in seen:
                seen.add(str(made))
                yield made
    for arch, dim in product(ARCHITECTURES, HEAD_DIMS):
        yield _delta_variant(arch, dim)


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


def variant(kernel: str, arch: int, dtype: str, dim: int, load: str, features: str, aligned: bool) -> Variant:
    """One kernel as a row of the table launches it."""
    config = CONFIGS[kernel, arch, 32 if dtype == "fp32" else 16, load][dim]
    name = f"{kernel.replace('short', 'forward')}_kernel"
    on = _FEATURES[load][features]
    constants: dict[str, bool | int] = {flag: flag in on for flag in _FLAGS}
    constants |= {"D": dim, "BLOCK_D": dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    if kernel == "extra":
        constants |= {"OF_POST": features == "post", "ONE_ROW": features == "row", "ONE_COLUMN": False}
    # Triton makes constants of strides that are 1; the last stride of a whole bias, mask or scale is.
    constants |= {"stride_bn": 1, "stride_mn": 1, "stride_pn": 1}
    names = [p.name for p in getattr(kernels, name).params]
    strides = [n for n in names if n.startswith("stride") and n not in constants]
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(_POINTERS, f"*{dtype}")
    signature |= {"Mask": "*i8", "Seed": "*i64", "Rows": "*fp32", "Delta": "*fp32", "DX": "*fp32"}
    signature |= {"qk_scale": "fp32", "log2_nk": "fp32", "dropout_p": "fp32"}
    shape = f"{dtype} D{dim} {config.block_m}x{config.block_n}"
    quick = features == "bias" and (dtype, dim) in (("fp16", 64), ("fp32", 64), ("fp16", 128))
    return Variant(
        kernel=f"{_MODULE}:{name}",
        signature=signature,
        constants=constants,
        arch=arch,
        label=f"{shape} {load} {features} {'aligned' if aligned else 'odd'}",
        divisible=tuple(strides if aligned else (n for n in strides if n[:8] in _OWN)),
        num_warps=config.warps,
        num_stages=config.stages,
        tensor_cores=dtype != "fp32",
        slow=not quick,
    )
