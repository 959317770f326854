"""A residual block behind an attention, in training on a CPU: two batch norms around a feed-forward net.

`z = norm1(x + output(y))`, then `norm2(z + contract(relu(expand(z))))`, as one step for autograd: sums and
norms are one pass, and so are a weight's gradient, its bias's and the ReLU's.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manyheads.core import parallel
from manyheads.core.dispatch import numba_installed
from manyheads.core.products import is_plain, linear, product, weight_gradient, wide_vectors_unused

# Numbers from which a norm is worth a second thread, which has to be woken.
_SHARED = 1 << 21


class Block(NamedTuple):
    """The block's layers."""

    output: nn.Module
    norm1: nn.Module
    expand: nn.Module
    contract: nn.Module
    norm2: nn.Module


def fits(block: Block, x: Tensor, y: Tensor) -> bool:
    """Tell whether `residual_block` can run: plain layers in training, whole vectors, the right CPU."""
    if not (is_plain(x, y) and wide_vectors_unused() and numba_installed() and torch.is_grad_enabled()):
        return False
    plain = all(_is_linear(part) for part in (block.output, block.expand, block.contract))
    plain = plain and all(_is_norm(part, x.shape[1]) for part in (block.norm1, block.norm2))
    return plain and x.shape == y.shape and x.shape[0] > 1 and x.shape[1] % 16 == 0


def _unhooked(part: nn.Module) -> bool:
    return not (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )


def _is_linear(part: nn.Module) -> bool:
    return (
        type(part) is nn.Linear and part.bias is not None and _unhooked(part) and is_plain(*part.parameters())
    )


def _is_norm(part: nn.Module, width: int) -> bool:
    return (
        type(part) is nn.BatchNorm1d
        and part.training
        and part.affine
        and part.track_running_stats
        and part.momentum is not None
        and part.num_features == width
        and _unhooked(part)
        and is_plain(*part.parameters(), part.running_mean, part.running_var)
    )


def residual_block(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """Apply the block, where `fits` says yes.

    Args:
        x: What is added.
        y: What the attention gave.

    Shape:
        x, y, the result `[M, width]`, M above 1.
    """
    output, norm1, expand, contract, norm2 = cast(Any, block)
    for norm in (norm1, norm2):
        norm.num_batches_tracked.add_(1)
    found: Tensor = _Block.apply(
        x.contiguous(), y.contiguous(), (norm1, norm2), output.weight, output.bias, norm1.weight, norm1.bias,
        expand.weight, expand.bias, contract.weight, contract.bias, norm2.weight, norm2.bias,
    )  # fmt: skip
    return found


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, norms: tuple[nn.BatchNorm1d, nn.BatchNorm1d], *parameters: Tensor
    ) -> Tensor:
        wo, bo, _, _, w1, b1, w2, b2, _, _ = parameters
        first = linear(y, wo, bo)
        z, mean1, inverse1 = _normalise(x, first, norms[0])
        hidden = linear(z, w1, b1, relu=True)
        second = linear(hidden, w2, b2)
        out, mean2, inverse2 = _normalise(z, second, norms[1])
        ctx.save_for_backward(
            y, first, mean1, inverse1, z, hidden, second, mean2, inverse2,
            wo, parameters[2], w1, w2, parameters[8],
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, first, mean1, inverse1, z, hidden, second, mean2, inverse2, wo, g1, w1, w2, g2 = ctx.saved_tensors
        dsecond, dg2, db2 = _normalise_backward(grad.contiguous(), second, g2, mean2, inverse2)
        dw2, dc2 = _weight_and_bias(dsecond, hidden)
        dw1, dc1, dhidden = weight_gradient(product(dsecond, w2), z, hidden)
        dc1 = dhidden.sum(0) if dc1 is None else dc1
        dz = product(dhidden, w1, dsecond)
        dfirst, dg1, db1 = _normalise_backward(dz, first, g1, mean1, inverse1)
        dwo, dco = _weight_and_bias(dfirst, y)
        return dfirst, product(dfirst, wo), None, dwo, dco, dg1, db1, dw1, dc1, dw2, dc2, dg2, db2


def _weight_and_bias(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias, _ = weight_gradient(grad, x)
    return weight, grad.sum(0) if bias is None else bias


def _normalise(x: Tensor, y: Tensor, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor, Tensor]:
    """`norm(x + y)`, mean and 1 / deviation; y becomes the sum."""
    from manyheads.core.residual_kernels import normalise

    out, (mean, inverse) = torch.empty_like(y), y.new_empty(2, y.shape[1])
    running = cast(Tensor, norm.running_mean).numpy(), cast(Tensor, norm.running_var).numpy()
    given = [z.detach().numpy() for z in (x, y, norm.weight, norm.bias)]
    numbers = [np.float32(norm.momentum), np.float32(norm.eps)]
    _run(normalise, y, [*given, *running, *numbers, mean.numpy(), inverse.numpy(), out.numpy()])
    return out, mean, inverse


def _normalise_backward(
    grad: Tensor, total: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, the weight and the bias."""
    from manyheads.core.residual_kernels import normalise_backward

    found = torch.empty_like(total), torch.empty_like(mean), torch.empty_like(mean)
    given = [x.detach().numpy() for x in (grad, total, weight, mean, inverse, *found)]
    _run(normalise_backward, total, given)
    return found


def _run(kernel: Any, x: Tensor, given: list[Any]) -> None:
    """Run a kernel over all columns, shared out to torch's threads."""
    steps = x.shape[1] // 16
    count = min(steps, parallel.workers() if x.numel() >= _SHARED else 1)
    bounds = [steps * i // count for i in range(count + 1)]
    parallel.run([partial(kernel, *given, low, high) for low, high in itertools.pairwise(bounds)])
