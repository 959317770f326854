"""Row norms as modules, with the state-dict keys of their namesakes in torch.nn.

Each takes a residual too: `y, z = norm(branch, residual=stream)` adds, normalises and returns both, in one
pass where a kernel runs. Sources: see `manyheads.core.ops.norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.core.ops.norm import crms_norm, layer_norm, rms_norm


class LayerNorm(nn.Module):
    """LayerNorm over the last axis.

    Args:
        dim: Width of the input.
        eps: Added to the variance.
        weight, bias: Learn a scale, a shift.

    Shape:
        x, residual, y, z: `[..., dim]`. The result is y; with a residual `(y, z)`, z = x + residual.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis; arguments and shapes as `LayerNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6, *, weight: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual."""
        return rms_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self)


class CRMSNorm(nn.Module):
    """RMSNorm of zero-mean rows of `dim + 1` entries, of which the input holds the first `dim`.

    Arguments and shapes as `LayerNorm`; made by `manyheads.core.layers.convert`.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, weight: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or x + residual."""
        return crms_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm] | type[CRMSNorm]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "crms": CRMSNorm,
}


def _arguments(module: LayerNorm | RMSNorm | CRMSNorm) -> str:
    return (
        f"{module.dim}, eps={module.eps}, weight={module.weight is not None}, bias={module.bias is not None}"
    )
