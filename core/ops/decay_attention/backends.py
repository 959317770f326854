"""Which backend a call of `decay_attention` gets, and why."""

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


def decay_attention(call: Call) -> list[Candidate]:
    """List the backends of `decay_attention`, best first."""
    return [
        *chunked(call, compiled=True),
        Candidate("reference", "no faster path takes this call: the plain formula, step by step"),
    ]


def chunked(call: Call, *, compiled: bool) -> list[Candidate]:
    """The paths that work chunk by chunk, best first; `compiled`: what is inside one has loops of ours."""
    blocked = cpu_blocked(call)
    if not blocked and call.dtype not in HALF_OR_SINGLE:
        blocked = f"it computes in float32, and the tensors are {name_of(call.dtype)}"
    loops = Candidate(
        "numba",
        "decays inside a chunk by compiled loops, the rest as products of matrices",
        numba_blocked(call),
    )
    kernels = triton_blocked(call)
    if not kernels and call.features.get("width") == "wide":
        kernels = "the kernels take keys and values of at most 256 channels"
    return [
        Candidate("triton", "states from chunk to chunk, then all chunks side by side", kernels),
        *([loops] if compiled else []),
        Candidate("cpu", "states go from chunk to chunk; inside one, products of matrices", blocked),
    ]
