"""Which backend a call of a row norm gets, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of, triton_blocked


def rms_norm(call: Call) -> list[Candidate]:
    """List the backends of `rms_norm`, best first."""
    composed = Candidate("torch", "too little work for an op of our own: torch's RMSNorm", _norm_torch(call))
    blockwise = _norm_cpu(call)
    small = call.features.get("size") == "small" or blockwise.blocked
    return _norm(call, [composed, blockwise] if small else [blockwise, composed])


def layer_norm(call: Call) -> list[Candidate]:
    """List the backends of `layer_norm`, best first."""
    native = Candidate("torch", "torch's own LayerNorm is one fused pass each way", _norm_torch(call))
    # Its CPU backward adds up the gradients of weight and bias row by row, in x's dtype.
    exact = not call.has("learns") or (call.dtype == torch.float32 and call.features.get("rows") == "few")
    return _norm(call, [native, _norm_cpu(call)] if exact else [_norm_cpu(call), native])


def crms_norm(call: Call) -> list[Candidate]:
    """List the backends of `crms_norm`, best first."""
    small = call.features.get("size") == "small"
    return _norm(call, [] if small else [_norm_cpu(call)], last=[_norm_cpu(call)] if small else [])


def _norm(call: Call, middle: list[Candidate], last: Sequence[Candidate] = ()) -> list[Candidate]:
    blocked = triton_blocked(call)
    if not blocked and call.features.get("row") == "long":
        blocked = "the kernels take rows of at most 8192 elements"
    kernel = Candidate("triton", "one fused pass over the rows each way, with the residual", blocked)
    if call.features.get("row") == "short":
        why = "rows of fewer than 16 elements cancel in the gradient: the plain formula bears it best"
        return [Candidate("reference", why), kernel, *middle, *last]
    return [
        kernel,
        *middle,
        Candidate("reference", "no faster path takes this call: the plain formula"),
        *last,
    ]


def _norm_cpu(call: Call) -> Candidate:
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"its statistics are float32, and the tensors are {name_of(call.dtype)}"
    return Candidate("cpu", "the backward goes block by block in the cache, with steady sums", blocked)


def _norm_torch(call: Call) -> str:
    return "torch wants weight and bias in the dtype of x" if call.has("mixed") else ""
