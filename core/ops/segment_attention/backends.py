"""Which backend a call of segment attention gets, and why."""

from __future__ import annotations

from manyheads.core.dispatch import HALF_OR_SINGLE, Call, Candidate, cpu_blocked, name_of, numba_blocked


def segment_attention(call: Call) -> list[Candidate]:
    """List the backends of `segment_attention`, best first."""
    composed = cpu_blocked(call)
    if not composed and call.dtype not in HALF_OR_SINGLE:
        composed = f"its sums are float32, and the tensors are {name_of(call.dtype)}"
    return [
        Candidate(
            "numba",
            "one loop over each node's edges, with nothing kept per edge and channel",
            numba_blocked(call),
        ),
        Candidate("cpu", "gathers and index_add in torch, with the backward written out", composed),
        Candidate("reference", "no faster path takes this call: the plain formula"),
    ]
