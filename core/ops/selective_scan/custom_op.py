"""`manyheads::selective_scan` and its backward: one custom op over the numba, torch and Triton forms."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.selective_scan.inputs import Inputs


@torch.library.custom_op("manyheads::selective_scan", mutates_args=())
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last states `[S, D, N]` in float32, and with `keep` the backward's states, or nothing."""
    given = Inputs(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse
    )  # fmt: skip
    y, last, kept = _module(backend).forward(given, keep)
    return y, last, kept


@selective_scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, (_, keep) = Inputs(u, delta, A, *rest[:-2]), rest[-2:]
    d, n = A.shape
    last = u.new_empty((given.sequences(), d, n), dtype=torch.float32)
    kept = u.new_empty((given.slots() if keep else 0, n, d), dtype=torch.float32)
    return u.new_empty(u.shape), last, kept


@torch.library.custom_op("manyheads::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of u, delta, A, B, C, then of D, z, delta_bias, initial_state where given."""
    given = Inputs(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse
    )  # fmt: skip
    found = _module(backend).backward(given, kept, dy, dlast)
    return [
        grad.to(x.dtype)
        for grad, x in zip(found, given[:9], strict=True)
        if grad is not None and x is not None
    ]


@selective_scan_backward_op.register_fake
def _(dy: Tensor, dlast: Tensor | None, kept: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in rest[:9] if x is not None]


def _module(backend: str) -> Any:
    return importlib.import_module(f"manyheads.core.ops.selective_scan.{backend}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.reverse, ctx.backend, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    kept, *tensors = ctx.saved_tensors
    if dy is None:  # only the last state was used
        dy = torch.zeros_like(tensors[0])
    found = iter(
        selective_scan_backward_op(dy, dlast, kept, *tensors, ctx.softplus, ctx.reverse, ctx.backend)
    )
    grads = [None if x is None else next(found) for x in tensors[:9]]
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *wanted, None, None, None, None, None


selective_scan_op.register_autograd(_pull_back, setup_context=_setup)
