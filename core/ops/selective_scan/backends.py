"""Which backend a selective scan gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import (
    HALF_OR_SINGLE,
    Call,
    Candidate,
    cpu_blocked,
    name_of,
    numba_blocked,
    triton_blocked,
)


def selective_scan(call: Call) -> list[Candidate]:
    """List the backends of `selective_scan`, best first."""
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"its states are float32, and the tensors are {name_of(call.dtype)}"
    kernel = triton_blocked(call)
    if not kernel and call.features.get("states") == "many":
        kernel = "the kernels hold at most 256 states a channel in registers"
    return [
        Candidate("triton", "states stay in registers, softplus, D and gate are fused", kernel),
        Candidate("numba", "one compiled loop over time, vectors of channels", numba_blocked(call)),
        Candidate("cpu", "chunks of steps stay in the cache", blocked),
        Candidate("reference", "no faster path takes this call: step by step"),
    ]
