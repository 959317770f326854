"""The delta rule as a `torch.library` op, so that torch.compile, torch.export and opcheck know it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from manyheads.core.ops.delta_rule import cpu


@torch.library.custom_op("manyheads::delta_rule", mutates_args=())
def delta_rule_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all sequences by one backend; as `cpu.forward`."""
    return _path(backend).forward(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, keep)


@delta_rule_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = q.shape[2], q.shape[3], v.shape[3]
    count = cpu.rows(q, cu_seqlens) if keep else 0
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return (
        out,
        q.new_empty(sequences, *shape, dtype=torch.float32),
        q.new_empty(count, *shape, dtype=torch.float32),
    )


@torch.library.custom_op("manyheads::delta_rule_backward", mutates_args=())
def delta_rule_backward_op(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay (empty where there is none) and the initial state."""
    dq, dk, dv, dbeta, ddecay, dinitial = _path(backend).backward(
        dout, dstate, q, k, v, beta, log_decay, cu_seqlens, kept, scale
    )
    return dq, dk, dv, dbeta, beta.new_empty(0) if ddecay is None else ddecay, dinitial


@delta_rule_backward_op.register_fake
def _(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    dq, dk, dv, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, beta))
    ddecay = beta.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return dq, dk, dv, dbeta, ddecay, state


def _path(backend: str) -> Any:
    return importlib.import_module(f"manyheads.core.ops.delta_rule.{backend}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, cu_seqlens, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _pull_back(ctx: Any, dout: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, log_decay, cu_seqlens, kept = ctx.saved_tensors
    nothing = (None,) * 10
    if dout is None and dstate is None:
        return nothing
    dout = torch.zeros_like(v) if dout is None else dout
    dq, dk, dv, dbeta, ddecay, dinitial = delta_rule_backward_op(
        dout, dstate, q, k, v, beta, log_decay, cu_seqlens, kept, ctx.scale, ctx.backend
    )
    start = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return dq, dk, dv, dbeta, None if log_decay is None else ddecay, start, *nothing[6:]


delta_rule_op.register_autograd(_pull_back, setup_context=_setup)
