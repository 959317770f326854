"""The row norms in plain torch: the truth that the other backends are held to.

Statistics are float32 (float64 for float64 inputs), whatever the dtype of the stream. With a residual, the
sum is rounded to the stream's dtype first and the norm is that of the rounded sum, which is what a backward
pass reads.

Source: LayerNorm, Ba et al. 2016 (arXiv 1607.06450); RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467);
CRMSNorm, Jiang et al. 2023 (arXiv 2305.14858).
"""

from __future__ import annotations

from torch import Tensor

from manyheads.core.ops.precision import wide


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide each row by its root mean square."""
    z = x if residual is None else x + residual
    row = wide(z)
    mean_square = row.square().mean(-1, keepdim=True)  # [..., 1]
    y = _affine(row * (mean_square + eps).rsqrt(), weight, bias).to(z.dtype)
    return y if residual is None else (y, z)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Take the mean from each row, then divide by its standard deviation."""
    z = x if residual is None else x + residual
    row = wide(z)
    centred = row - row.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)  # [..., 1]
    y = _affine(centred * (variance + eps).rsqrt(), weight, bias).to(z.dtype)
    return y if residual is None else (y, z)


def crms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of a zero-mean row of d entries, of which the input holds the first d - 1.

    The missing entry is minus the sum of the others, so the mean square needs no storage for it.
    """
    z = x if residual is None else x + residual
    row = wide(z)
    missing = row.sum(-1, keepdim=True)  # up to its sign, which the square forgets
    mean_square = (row.square().sum(-1, keepdim=True) + missing.square()) / (row.shape[-1] + 1)
    y = _affine(row * (mean_square + eps).rsqrt(), weight, bias).to(z.dtype)
    return y if residual is None else (y, z)


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else normed + bias
