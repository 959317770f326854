"""Products of float32 matrices on a CPU, by the library that uses the widest vectors of it.

PyTorch's products of matrices go to MKL, which on CPUs of AMD leaves AVX-512 unused: half of the speed.
oneDNN, which PyTorch has on board for convolutions, uses it. So where a product is large enough to be worth
the call, and the CPU is one of those, it goes to oneDNN, and so do the two products of a linear layer's
gradient; everywhere else to PyTorch's own. oneDNN adds up a row one product after the other, and its rounding
grows with the length: rows are cut, so that it stays below twice MKL's.

What oneDNN compiles for a shape it keeps, of the last 1024 shapes. Where lengths or graphs make ever new ones
memory grows by hundreds of MiB, up to two GiB, and few of them ever come again: it is told to keep fewer.
"""

from __future__ import annotations

import itertools
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from manyheads.core import parallel
from manyheads.core.dispatch import numba_installed

# Both caches read their size at the first product. To compile a shape again takes 0.1 to 0.2 ms.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

# Products of a row that are added up at once: rounding is then 1.7 times that of MKL, which cuts rows too; at
# 256 it is 1.2 times, and the product takes a fifth longer.
_ROW = 512
# Multiplications below which the call's overhead is more than what it saves.
_SMALL = 1 << 20
# Gradients of weights up to this size are those of compiled loops, or MKL's.
_NARROW = 1 << 15
# Rows from which compiled loops are faster than MKL at gradients of narrow weights.
_MANY = 256
# Multiplications from which these loops are worth a second thread.
_SHARED = 1 << 26


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    relu: bool = False,
    silu: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear`, with oneDNN where it is faster; in the same pass `+ add`, a ReLU or SiLU.

    Shape:
        x `[..., K]`; weight `[N, K]`; bias `[N]`; add and the result `[..., N]`.
    """
    # Whether a graph is traced comes first: a look at sizes would put a guard on them.
    plain = is_plain(x, weight, bias, add) and wide_vectors_unused()
    if not plain or weight.numel() * (x.numel() // x.shape[-1]) < _SMALL:
        return _finished(F.linear(x, weight, bias), add, relu, silu)
    rows = x.reshape(-1, x.shape[-1])
    added = None if add is None else add.reshape(-1, weight.shape[0])
    if not _learns(x, weight, bias, add):
        out = _cut(rows, weight, bias, added, relu, silu)
    else:
        out = _finished(_Linear.apply(rows, weight, bias, added, relu), None, False, silu)
    return out.view(*x.shape[:-1], weight.shape[0])


def _finished(out: Tensor, add: Tensor | None, relu: bool, silu: bool = False) -> Tensor:
    out = out if add is None else add + out
    out = F.relu(out) if relu else out
    return F.silu(out, inplace=not torch.is_grad_enabled()) if silu else out


class _Linear(torch.autograd.Function):
    """A linear layer on rows `[M, K]`, with its gradients as products of this module."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, relu: bool
    ) -> Tensor:
        out = _cut(x, weight, bias, add, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        dx, dweight, dbias, dadd, _ = ctx.needs_input_grad
        found, total = None, None
        if dweight:
            found, total, grad = weight_gradient(grad, x, out)
        elif out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        return (
            product(grad, weight) if dx else None,
            found,
            (grad.sum(0) if total is None else total) if dbias else None,
            grad if dadd else None,
            None,
        )


def weight_gradient(
    grad: Tensor, x: Tensor, shown: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of a linear layer: `grad.t() @ x`, perhaps its bias's `grad.sum(0)`, and the gradient that was taken.

    Args:
        grad: What came back.
        x: What went in.
        shown: What came out, where a ReLU followed: the gradient is zero where this is not positive.

    Shape:
        grad, shown `[M, N]`; x `[M, K]`; the results `[N, K]`, `[N]` or None, `[M, N]`.
    """
    if _fits_loops(grad, x):
        return _by_loops(grad, x, shown)
    if shown is not None:
        grad = torch.ops.aten.threshold_backward(grad, shown, 0)
    if grad.shape[1] * x.shape[1] <= _NARROW:  # cutting many rows costs more than MKL's narrower vectors
        return torch.mm(grad.t(), x), None, grad
    # the longer side last, at which oneDNN is faster
    turned = grad.shape[1] > x.shape[1]
    return product(x.t(), grad).t() if turned else product(grad.t(), x), None, grad


def _fits_loops(grad: Tensor, x: Tensor) -> bool:
    """Tell whether compiled loops are faster: many rows, few columns, in whole vectors."""
    narrow = grad.shape[1] * x.shape[1] <= _NARROW and grad.shape[1] % 16 == 0 and x.shape[1] % 64 == 0
    usual = grad.is_contiguous() and x.is_contiguous() and is_plain_inference(grad, x)
    return grad.shape[0] >= _MANY and narrow and usual and wide_vectors_unused() and numba_installed()


def _by_loops(grad: Tensor, x: Tensor, shown: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from manyheads.core.products_kernels import outer

    found, total = grad.new_empty(grad.shape[1], x.shape[1]), grad.new_empty(grad.shape[1])
    kept = grad if shown is None else torch.empty_like(grad)
    mask = grad[:0] if shown is None else shown.contiguous()
    given = [y.numpy() for y in (grad, x, found, total, mask, kept)]
    steps = grad.shape[1] // 16
    count = min(steps, parallel.workers() if grad.numel() * x.shape[1] >= _SHARED else 1)
    bounds = [16 * (steps * i // count) for i in range(count + 1)]
    loops: Any = outer  # compiled: it has no signature
    parallel.run([partial(loops, *given, low, high) for low, high in itertools.pairwise(bounds)])
    return found, total, kept


def project(layer: nn.Module, x: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
    """Apply a linear layer as `linear` does; one with hooks, or another module, as it is.

    Shape:
        x `[..., in]`; add and the result `[..., out]`.
    """
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return _finished(layer(x), add, relu)
    return linear(x, layer.weight, layer.bias, add=add, relu=relu)


def product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    """`a @ b`, and `+ add`, with oneDNN where it is faster.

    Shape:
        a `[M, K]`; b `[K, N]`; add and the result `[M, N]`.
    """
    plain = is_plain_inference(a, b, add) and wide_vectors_unused()
    if not plain or a.numel() * b.shape[1] < _SMALL:
        return torch.mm(a, b) if add is None else torch.addmm(add, a, b)
    return _cut(a, b.t(), None, add)


def _cut(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    relu: bool = False,
    silu: bool = False,
) -> Tensor:
    run = torch.ops.mkldnn._linear_pointwise
    if (relu or silu) and add is None and x.shape[1] <= _ROW:
        found: Tensor = run(x, _plain(weight), bias, "relu" if relu else "swish", [], "")
        return found
    for start in range(0, x.shape[1], _ROW):
        part, taps = x[:, start : start + _ROW], _plain(weight[:, start : start + _ROW])
        if add is None:
            add = run(part, taps, bias, "none", [], "")
        else:
            add = run.binary(part, add, taps, None if start else bias, "add")
    assert add is not None  # a row has at least one element: `is_plain`
    return _finished(add, None, relu, silu)


def _plain(weight: Tensor) -> Tensor:
    """A weight without gaps between its rows or columns: with them oneDNN falls back to a naive loop."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def is_plain_inference(*given: Tensor | None) -> bool:
    """Tell whether oneDNN's kernels, which have no gradients, may compute with these tensors.

    They are float32 tensors on a CPU, none wants a gradient, and nothing is traced, compiled or autocast.
    """
    return is_plain(*given) and not _learns(*given)


def is_plain(*given: Tensor | None) -> bool:
    """Tell whether these are float32 tensors on a CPU, and no trace, transform or autocast looks at them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(
        type(x) in (Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        for x in given
        if x is not None
    )


def _learns(*given: Tensor | None) -> bool:
    """Tell whether one of these wants a gradient now."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


@cache
def wide_vectors_unused() -> bool:
    """Tell whether this is a CPU of AMD with AVX-512, under a PyTorch that has MKL and oneDNN."""
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and info.exists()
        and "AuthenticAMD" in info.read_text()
    )
