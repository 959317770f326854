"""Row norms with a fused residual add: the public functions and their dispatch.

The mathematics, with the backward's derivation, is in README.md beside this file.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.core.dispatch import choose
from manyheads.core.ops.norm import cpu, custom_op, reference

__all__ = ["crms_norm", "layer_norm", "rms_norm"]

_REFERENCE = {"rms": reference.rms_norm, "layer": reference.layer_norm, "crms": reference.crms_norm}


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide each row by its root mean square, then scale and shift it.

    Args:
        x: float32, bfloat16 or float16 (float64 too, without a kernel); any strides.
        weight, bias: Of any of these dtypes; statistics and products are float32.
        eps: Added to the mean square.
        residual: Added to x first. The sum has the wider of the two dtypes.

    Shape:
        x, residual, y, z: `[..., d]`; weight, bias: `[d]`.

    Returns:
        y, in the sum's dtype; with a residual `(y, z)`, z = x + residual and y = the norm of z.

    Raises:
        TypeError: x is not floating point.
        ValueError: Shapes do not fit.
        UsageError: The backend that was asked for cannot run this call.

    Source:
        Zhang and Sennrich 2019, arXiv 1910.07467.

    Example:
        >>> y, z = rms_norm(branch, weight, residual=stream)
    """
    return _norm("rms", x, weight, bias, eps, residual)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Take each row's mean from it and divide it by its standard deviation, then scale and shift it.

    Arguments, shapes, results and errors as `rms_norm`; eps is added to the variance.

    Source:
        Ba et al. 2016, arXiv 1607.06450.
    """
    return _norm("layer", x, weight, bias, eps, residual)


@overload
def crms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
) -> Tensor: ...
@overload
def crms_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ..., residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def crms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def crms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of a zero-mean row of d entries, of which x holds the first d - 1.

    The last entry is minus the sum of the others, and needs no storage.

    Arguments, shapes (with d - 1 for d), results and errors as `rms_norm`.

    Source:
        Jiang et al. 2023, arXiv 2305.14858.
    """
    return _norm("crms", x, weight, bias, eps, residual)


def _norm(
    kind: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    op = f"{kind}_norm"
    _check(op, x, weight, bias, residual)
    given = [t for t in (x, residual, weight, bias) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mixed = any(t.dtype != dtype for t in (weight, bias) if t is not None)
    backend = choose(op, device=x.device.type, dtype=dtype, learns=learns, mixed=mixed, **_sizes(x)).backend
    if backend == "reference":
        return _REFERENCE[kind](x, weight, bias, eps=eps, residual=residual)
    if backend == "torch":
        z = x if residual is None else x + residual
        y = _torch(kind, z, weight, bias, eps)
        return y if residual is None else (y, z)
    # Without gradients the CPU path needs no op around it: plain torch calls, without the op's overhead.
    run = cpu.forward if backend == "cpu" and not learns else custom_op.norm
    y, z, _ = run(x, residual, weight, bias, eps, kind)
    return y if residual is None else (y, z)


def _sizes(x: Tensor) -> dict[str, str]:
    """Sizes in words: torch.compile, for which they may be symbols, takes these for constants."""
    d = x.shape[-1]
    row = "short" if d < 16 else "long" if d > 8192 else "usual"
    if torch.compiler.is_exporting():  # a look at the batch would hold the program to batches like it
        return {"row": row, "rows": "many", "size": "large"}
    rows = "few" if x.numel() <= cpu.few_rows(d) * d else "many"
    size = "small" if x.numel() < 1 << 17 else "large"
    return {"row": row, "rows": rows, "size": size}


def _torch(kind: str, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    y = F.rms_norm(z, z.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be [..., d] with d > 0, not {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must be [{x.shape[-1]}], as x's rows, not {tuple(vector.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}; expand it"
        )
