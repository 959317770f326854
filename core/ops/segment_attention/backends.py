"""Which backend a call of segment attention gets, and why."""

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


def segment_attention(call: Call) -> list[Candidate]:
    """List the backends of `segment_attention`, best first."""
    kernels = triton_blocked(call)
    if not kernels and call.features.get("width") == "wide":
        kernels = "the kernels take head dims of at most 128"
    composed = cpu_blocked(call)
    if not composed and call.dtype not in HALF_OR_SINGLE:
        composed = f"its sums are float32, and the tensors are {name_of(call.dtype)}"
    walk = "one walk over each node's edges, with nothing kept per edge and channel"
    return [
        Candidate("triton", walk, kernels),
        Candidate("numba", walk, numba_blocked(call)),
        Candidate("cpu", "gathers and index_add in torch, with the backward written out", composed),
        Candidate("reference", "no faster path takes this call: the plain formula"),
    ]
